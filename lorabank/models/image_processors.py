"""Where a model's folder keeps its image processor's settings, and which of transformers' classes reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN, NESTED = "preprocessor_config.json", "processor_config.json"
"""An image processor's own file, and one of several processors in which it is the entry `image_processor`."""


def settings_file(folder: Path, part: str = "image_processor") -> Path | None:
    """The file that transformers reads an image processor from: the entry in NESTED comes before OWN. None: there is none.

    `part`: another entry, such as `feature_extractor`, which is kept in the same files.

    A NESTED that can't be read counts as having one, so that reading its settings says so.
    """
    nested, own = folder / NESTED, folder / OWN
    if nested.is_file():
        try:
            if part in _json(nested):
                return nested
        except ValueError:
            return nested
    return own if own.is_file() else None


def settings_of(folder: Path) -> dict[str, Any]:
    """An image processor's settings in a folder; empty where there are none. Raises ValueError for a file that isn't JSON."""
    file = settings_file(folder)
    said = {} if file is None else _json(file)
    return said["image_processor"] if file is not None and file.name == NESTED else said


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put an image processor's settings where the folder has them; into a file of its own where it has none."""
    file = settings_file(folder) or folder / OWN
    whole = {**_json(file), "image_processor": settings} if file.name == NESTED else settings
    file.write_text(json.dumps(whole, indent=2, default=list) + "\n", encoding="utf-8")


def processor_class(folder: Path) -> Any:
    """The class that a folder's settings name, by preference one that does without torchvision.

    transformers' automatic class, for what they don't name, wants torchvision in some of its versions.
    """
    import transformers

    said = settings_of(folder)
    name = said.get("image_processor_type") or said.get("feature_extractor_type", "").replace(
        "FeatureExtractor", "ImageProcessor"
    )
    plain = name.removesuffix("Fast").removesuffix("Pil")
    found = [getattr(transformers, each, None) for each in (f"{plain}Pil", plain) if plain]
    return next((kind for kind in found if kind is not None), transformers.AutoImageProcessor)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
