"""`load_for`: the base of an adapter in the class that the adapter was trained on, to be merged into: classifiers and others.

Language models that continue text come from `load_base`, which has more to say of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabank.errors import ModelError
from lorabank.formats.adapter import Adapter
from lorabank.models.cache import Say
from lorabank.models.folder import check_folder
from lorabank.models.load import load_base, locate, pick_device, pick_dtype
from lorabank.models.quiet import quiet_transformers
from lorabank.models.reading import config_of, incomplete, tokenizer_in, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorabank.bank.task_class import TaskModel

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A base in an adapter's class. A head that the adapter has in full may be random: its values take the place."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None for a model that reads no text, or a folder without one."""
    folder: Path
    causal: bool
    """Whether it is a language model that continues text."""


def load_for(
    name: str, adapter: Adapter, *, dtype: str = "auto", device: str = "auto", say: Say = lambda line: None
) -> LoadedTask:
    """Load the base `name` (hub id, folder, GGUF file or alias) as the model that `adapter` was trained on.

    Tables of tokens are as large as the adapter's own. dtype, device: as `load_base` has them, without quantised storages for
    what isn't a language model. Raises ModelError where the base lacks weights that the adapter hasn't got either, ConfigError
    for a wrong dtype or device.
    """
    from lorabank.bank.task_class import is_causal, task_model

    where = pick_device(device)
    folder = locate(name, say=say)
    settings = check_folder(folder)
    with quiet_transformers():
        config = config_of(name, folder, settings, trust_remote_code=False)
        task = task_model(config, adapter, repr(name))
    if is_causal(task.kind, config):
        base = load_base(name, dtype=dtype, device=device, say=say)
        found = LoadedTask(model=base.model, tokenizer=base.tokenizer, folder=folder, causal=True)
    else:
        has_tokenizer = any((folder / file).is_file() for file in TOKENIZER)
        with quiet_transformers():
            tokenizer = tokenizer_in(name, folder, trust_remote_code=False) if has_tokenizer else None
            model = _loaded(name, folder, config, task, adapter, pick_dtype(dtype, where))
        cast("Any", model).to(where)
        found = LoadedTask(model=model.eval(), tokenizer=tokenizer, folder=folder, causal=False)
    _grow(name, found.model, adapter, config, task)
    return found


def _loaded(name: str, folder: Path, config: Any, task: TaskModel, adapter: Adapter, dtype: Any) -> PreTrainedModel:
    from lorabank.bank.in_full.heads import DENOISING
    from lorabank.bank.task_class import label_settings

    if task.labels is not None:
        config.num_labels = task.labels
    for name_of, value in label_settings(config, task, adapter).items():
        setattr(config, name_of, {int(i): text for i, text in value.items()} if name_of == "id2label" else value)
    model, info = weights_of(name, task.kind, folder, config, dtype=dtype, ignore_mismatched_sizes=task.labels is not None)
    noised = DENOISING.get(str(config.model_type))  # of the base's categories, and nothing of it is in a prediction
    if f"{noised}.weight" in info.other_shape:
        model.get_parameter(f"{noised}.weight").data.zero_()
    if missing := _not_in_full(adapter, {*info.missing, *info.other_shape} - {f"{noised}.weight"}):
        way_out = "Name the base that it was trained on."
        raise incomplete(name, model, missing, way_out, therefore="and the adapter hasn't got them either, so")
    return model


def _not_in_full(adapter: Adapter, names: Iterable[str]) -> list[str]:
    own = tuple(f"{path}." for path in adapter.modules)
    return sorted(name for name in names if not name.startswith(own))


def _grow(name: str, model: PreTrainedModel, adapter: Adapter, config: Any, task: TaskModel) -> None:
    """Tables of tokens as large as the adapter's own, where it was trained with added tokens."""
    from lorabank.bank.task_class import vocabulary

    ids = vocabulary(config, task, adapter)
    if ids is None:
        return
    before = {key: p.shape for key, p in model.named_parameters(remove_duplicate=False)}
    model.resize_token_embeddings(ids, mean_resizing=False)
    after = {key: p.shape for key, p in model.named_parameters(remove_duplicate=False)}
    if other := _not_in_full(adapter, [key for key, shape in after.items() if shape != before.get(key)]):
        raise ModelError(
            f"model {name!r}: the adapter has {ids} tokens, and {other[0]} has {before[other[0]][0]}: what it was for the others "
            "in training isn't in the adapter's file. Name the base that it was trained on, saved with its tokens."
        )


def architecture(folder: Path) -> tuple[str, str]:
    """(class, model type) that a model folder's config.json names."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str((said.get("architectures") or ["?"])[0]), str(said.get("model_type"))
