"""lorabank: one frozen base, many low-rank adapters: trained together, compared, merged and served from the same process.

    bank = lorabank.attach(model)
    bank.add("formal", lorabank.AdapterConfig(rank=16))
    with bank.route(["formal", lorabank.BASE]):
        logits = model(**batch).logits

Names are loaded when they are first used, so that importing lorabank costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AdapterConfig": "lorabank.config.adapter",
    "TrainConfig": "lorabank.config.train",
    "AdapterRun": "lorabank.config.train",
    "DataConfig": "lorabank.config.train",
    "EvalConfig": "lorabank.config.train",
    "SaveConfig": "lorabank.config.train",
    "Adapter": "lorabank.formats.adapter",
    "AdapterLayer": "lorabank.formats.adapter",
    "AdapterBank": "lorabank.bank.bank",
    "attach": "lorabank.bank.attach",
    "quantize_base": "lorabank.bank.storages.quantized",
    "eva": "lorabank.bank.starts.eva",
    "loftq": "lorabank.bank.starts.loftq",
    "BASE": "lorabank.bank.routing",
    "Routing": "lorabank.bank.routing",
    "combine": "lorabank.merging.combine",
    "combine_and_measure": "lorabank.merging.combine",
    "merge": "lorabank.merging.merge",
    "merge_folder": "lorabank.merging.shards",
    "train": "lorabank.api",
    "evaluate": "lorabank.trained",
    "predict": "lorabank.trained",
    "TrainingPass": "lorabank.engine.own_pass",
    "SaveAdapterCallback": "lorabank.training.hf",
    "LorabankError": "lorabank.errors",
}

if TYPE_CHECKING:
    from lorabank.api import train as train
    from lorabank.bank.attach import attach as attach
    from lorabank.bank.bank import AdapterBank as AdapterBank
    from lorabank.bank.routing import BASE as BASE
    from lorabank.bank.routing import Routing as Routing
    from lorabank.bank.starts.eva import eva as eva
    from lorabank.bank.starts.loftq import loftq as loftq
    from lorabank.bank.storages.quantized import quantize_base as quantize_base
    from lorabank.config.adapter import AdapterConfig as AdapterConfig
    from lorabank.config.train import AdapterRun as AdapterRun
    from lorabank.config.train import DataConfig as DataConfig
    from lorabank.config.train import EvalConfig as EvalConfig
    from lorabank.config.train import SaveConfig as SaveConfig
    from lorabank.config.train import TrainConfig as TrainConfig
    from lorabank.engine.own_pass import TrainingPass as TrainingPass
    from lorabank.errors import LorabankError as LorabankError
    from lorabank.formats.adapter import Adapter as Adapter
    from lorabank.formats.adapter import AdapterLayer as AdapterLayer
    from lorabank.merging.combine import combine as combine
    from lorabank.merging.combine import combine_and_measure as combine_and_measure
    from lorabank.merging.merge import merge as merge
    from lorabank.merging.shards import merge_folder as merge_folder
    from lorabank.trained import evaluate as evaluate
    from lorabank.trained import predict as predict
    from lorabank.training.hf import SaveAdapterCallback as SaveAdapterCallback

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterRun",
    "BASE",
    "DataConfig",
    "EvalConfig",
    "LorabankError",
    "Routing",
    "SaveAdapterCallback",
    "SaveConfig",
    "TrainConfig",
    "TrainingPass",
    "attach",
    "combine",
    "combine_and_measure",
    "eva",
    "evaluate",
    "loftq",
    "merge",
    "merge_folder",
    "predict",
    "quantize_base",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'lorabank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
