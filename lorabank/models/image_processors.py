"""Which of transformers' image processors reads a folder's settings, by preference one that does without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def processor_class(folder: Path) -> Any:
    """The class that a folder's file names. transformers' automatic class wants torchvision in some of its versions."""
    import transformers

    file = folder / "preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    name = said.get("image_processor_type") or said.get("feature_extractor_type", "").replace(
        "FeatureExtractor", "ImageProcessor"
    )
    plain = name.removesuffix("Fast").removesuffix("Pil")
    found = [getattr(transformers, each, None) for each in (f"{plain}Pil", plain) if plain]
    return next((kind for kind in found if kind is not None), transformers.AutoImageProcessor)
