"""`load_class`: a base model of any of transformers' automatic classes, from a hub id or a folder, and its inputs' processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.errors import ModelError, closest
from lorabank.models.cache import Say
from lorabank.models.dtypes import dtype_notes
from lorabank.models.folder import check_folder
from lorabank.models.load import locate, pick_device, pick_dtype
from lorabank.models.quiet import quiet_transformers
from lorabank.models.reading import config_of, fill_pad_token, incomplete, tokenizer_in, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Processor = Callable[[str, Path], Any]
"""(the model's name for messages, its folder) → what prepares its inputs. Raises ModelError."""


@dataclass(frozen=True, kw_only=True)
class LoadedClass:
    """A base model as one of transformers' classes."""

    model: PreTrainedModel
    """In eval mode, on its device."""
    processor: Any
    folder: Path
    fresh: tuple[str, ...]
    """Weights that its files don't have, random now: those of a head."""
    notes: tuple[str, ...]
    """Sentences for the user."""


def load_class(
    name: str,
    auto: Any,
    processor: Processor,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> LoadedClass:
    """Load the model `name` (hub id or folder) by `auto` (such as `AutoModelForSequenceClassification`).

    Its files may lack the weights of a classifier's head, which an adapter brings; all others must be there. dtype: `auto` is
    bf16 on a GPU, fp32 on a CPU. Raises ModelError and ConfigError.
    """
    import torch

    from lorabank.bank.in_full.heads import head_parameters

    where = pick_device(device)
    number = pick_dtype(dtype, where)
    folder = locate(name, trust_remote_code=trust_remote_code, say=say)
    settings = check_folder(folder)
    with quiet_transformers():
        config = config_of(name, folder, settings, trust_remote_code=trust_remote_code)
        _check_class(name, auto, config)
        prepared = processor(name, folder)
        model, info = weights_of(name, auto, folder, config, dtype=number, trust_remote_code=trust_remote_code)
    if lost := [key for key in info.missing if key not in head_parameters(model)]:
        raise incomplete(name, model, lost, "Use a complete checkpoint.")
    torch.nn.Module.to(model, where)  # PreTrainedModel's own `to` is typed wrongly
    notes = (*dtype_notes(dtype, number, where), *info.notes)
    return LoadedClass(model=model.eval(), processor=prepared, folder=folder, fresh=tuple(info.missing), notes=notes)


def tokenizer_of(name: str, folder: Path) -> Any:
    """The tokenizer in a model's folder, with a pad token. Raises ModelError."""
    tokenizer = tokenizer_in(name, folder, trust_remote_code=False)
    fill_pad_token(tokenizer)
    return tokenizer


def _check_class(name: str, auto: Any, config: Any) -> None:
    known = [kind.model_type for kind in auto._model_mapping]
    if config.model_type not in known and not getattr(config, "auto_map", None):
        raise ModelError(
            f"model {name!r}: transformers has no {auto.__name__.removeprefix('AutoModelFor')} model of type "
            f"{config.model_type!r}{closest(config.model_type, known)}."
        )
