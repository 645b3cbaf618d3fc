"""What `lorabank preview` reads of a pipeline: tokenizers, and configurations, which say what sides a picture can have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorabank.config.paths import expanded
from lorabank.errors import ModelError, first_line
from lorabank.models.folder import read_json
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.diffusion.load import (
    INDEX,
    LoadedImageModel,
    Say,
    check_index,
    family_of,
    has_class,
    import_diffusers,
    no_bars,
    tokenizer_of,
    unfetched,
)
from lorabank.tasks.diffusion.model import ImageModel

_SMALL = ("*.json", "*.txt", "*.model")
"""Files of a hub's pipeline that have no weights."""


def load_image_preview(name: str, *, say: Say = lambda line: None) -> LoadedImageModel:
    """A model without weights (its tensors are on torch's `meta` device) or text encoders, with the pipeline's tokenizers.

    Raises ModelError for what is no pipeline of a known family, or can't be read; MissingExtraError.
    """
    diffusers = import_diffusers()
    path = expanded(name, place="model")
    folder = path if path.is_dir() else _fetched(name)
    family = family_of(folder, name)
    say(f"reading the tokenizers of {family.name} pipeline {name} …")
    index = read_json(folder / INDEX, repr(name))
    check_index(family, index)
    read = [encoder for encoder in family.encoders if has_class(index, tokenizer_of(encoder))]
    try:
        with quiet_transformers(), no_bars(diffusers):
            scheduler = getattr(diffusers, _class_of(index, "scheduler"))
            model = ImageModel(
                family,
                _unfilled(diffusers, folder, index, family.denoiser),
                scheduler=scheduler.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True),
                tokenizers={encoder: _tokenizer(folder, index, encoder) for encoder in read},
                vae=_unfilled(diffusers, folder, index, "vae"),
            )
    except Exception as error:  # a damaged file surfaces as one of a dozen classes of four libraries
        raise ModelError(
            f"model {name!r}: the pipeline can't be read ({first_line(error)}). Copy or download it again."
        ) from error
    return LoadedImageModel(model=model, folder=folder, notes=())


def _fetched(name: str) -> Path:
    """The snapshot of a hub id, without weights."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_SMALL)))
    except Exception as error:  # the hub client's errors have another class in each of its major versions
        raise unfetched(name, error) from error


def _class_of(index: Mapping[str, Any], part: str) -> str:
    if not has_class(index, part):
        raise ValueError(f"{INDEX} names no class of {part}")
    return str(index[part][1])


def _unfilled(diffusers: Any, folder: Path, index: Mapping[str, Any], part: str) -> nn.Module:
    kind = getattr(diffusers, _class_of(index, part))
    with torch.device("meta"):
        return kind.from_config(kind.load_config(str(folder / part), local_files_only=True))


def _tokenizer(folder: Path, index: Mapping[str, Any], encoder: str) -> Any:
    part = tokenizer_of(encoder)
    return getattr(transformers, _class_of(index, part)).from_pretrained(str(folder / part), local_files_only=True)
