"""`skeleton`: the modules of a model folder without their weights, to tell what a file's names mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabank.errors import MissingExtraError, ModelError
from lorabank.models.quiet import quiet_transformers

PIPELINE = "model_index.json"


def skeleton(folder: Path) -> nn.Module:
    """The model in a folder on the meta device; of a diffusers pipeline, one module with its models as children.

    Reads configurations alone. Raises ModelError for a folder that holds neither, MissingExtraError without diffusers.
    """
    if (folder / PIPELINE).is_file():
        return _pipeline(folder)
    if (folder / "config.json").is_file():
        settings = _json(folder / "config.json")
        if "_diffusers_version" in settings:
            return _diffusers(folder, str(settings.get("_class_name")))
        names = settings.get("architectures") or ["AutoModel"]
        return _transformers(folder, str(names[0]))
    raise ModelError(f"{folder}: expected a model folder with config.json, or a pipeline's with {PIPELINE}; it has neither.")


def _pipeline(folder: Path) -> nn.Module:
    holder = nn.Module()
    for name, entry in _json(folder / PIPELINE).items():
        if not isinstance(entry, list) or len(entry) != 2 or not (folder / name / "config.json").is_file():
            continue
        library, kind = entry
        if library == "diffusers":
            holder.add_module(name, _diffusers(folder / name, str(kind)))
        elif library == "transformers":
            holder.add_module(name, _transformers(folder / name, str(kind)))
    return holder


def _diffusers(folder: Path, kind: str) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError(f"{folder}: a diffusers model, and diffusers isn't installed: pip install diffusers") from error
    found: Any = getattr(diffusers, kind, None)
    if found is None:
        raise ModelError(f"{folder}: diffusers {diffusers.__version__} has no class {kind!r}. Update diffusers.")
    with torch.device("meta"):
        return found.from_config(found.load_config(str(folder)))


def _transformers(folder: Path, kind: str) -> nn.Module:
    import transformers

    found: Any = getattr(transformers, kind, None)
    if found is None:
        raise ModelError(f"{folder}: transformers {transformers.__version__} has no class {kind!r}. Update transformers.")
    with quiet_transformers(), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(str(folder))
        config = config if found.config_class is None or isinstance(config, found.config_class) else config.text_config
        return found.from_config(config) if kind.startswith("Auto") else found(config)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: no valid JSON ({error}). Fetch the model again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object. Fetch the model again.")
    return data
