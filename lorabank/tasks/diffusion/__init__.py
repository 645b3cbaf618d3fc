"""Image generation: LoRA on Stable Diffusion 1.x, 2.x, XL, 3 and Flux, through diffusers' models. `KIND` is its entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorabank.config.train import TrainConfig
from lorabank.errors import ConfigError, closest
from lorabank.formats.adapter import Adapter
from lorabank.training.processors import ProcessorKind
from lorabank.training.task import BaseRequest, Say, Task, TaskBase, TaskKind

METRICS = ("loss",)


def _check_metrics(metrics: Sequence[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"expected {', '.join(METRICS)}, got {name!r}{closest(name, METRICS)}")


def _load(request: BaseRequest, say: Say) -> TaskBase:
    from lorabank.tasks.diffusion.load import load_image_model

    made = load_image_model(request.model, dtype=request.dtype, device=request.device, say=say)
    return TaskBase(model=made.model, processor=None, name=request.model, folder=made.folder, notes=made.notes)


def _load_preview(request: BaseRequest, say: Say) -> TaskBase:
    from lorabank.tasks.diffusion.load_preview import load_image_preview

    made = load_image_preview(request.model, say=say)
    return TaskBase(model=made.model, processor=None, name=request.model, folder=made.folder, notes=made.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> Task[Any]:
    from lorabank.tasks.diffusion.task import TextToImage

    return TextToImage(config, model, adapters)


def _adopt(model: object) -> nn.Module:
    from lorabank.tasks.diffusion.load import of_object

    return of_object(model)


def _no_object(given: object) -> bool:
    return False


NO_PROCESSOR = ProcessorKind(
    expected="no object beside the model, since a pipeline has its tokenizers itself", accepts=_no_object, without=""
)
KIND = TaskKind(
    load=_load,
    open=_open,
    check_metrics=_check_metrics,
    load_preview=_load_preview,
    processor=NO_PROCESSOR,
    adopt=_adopt,
)
