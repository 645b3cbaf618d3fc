"""A merged model's image processor: what the adapter was trained with, where that differs from the base's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorabank.config.images import ImagesConfig
from lorabank.formats.adapter import Adapter
from lorabank.formats.task_settings import task_settings
from lorabank.tasks.images.kept import KEPT as IMAGES
from lorabank.tasks.images.load import PROCESSOR_FILES, size_of
from lorabank.tasks.images.preprocess import load_processor, plain_processor, read_off

OWN, NESTED = PROCESSOR_FILES
"""An image processor's own file, and one in which it is the entry `image_processor`."""


def fit_processor(folder: Path, adapter: Adapter) -> str | None:
    """Make the processor in a merged model's folder give pictures of the adapter's size; a sentence on it, None: as it was."""
    images, detection = task_settings(adapter, "images"), task_settings(adapter, "detection")
    there = any((folder / file).is_file() for file in PROCESSOR_FILES)
    if images and (images.get("image_size") is not None or not there):
        settings: ImagesConfig = IMAGES.merged(ImagesConfig(), {"adapter": adapter})
        side = settings.image_size or size_of(_json(folder / "config.json").get("image_size"))
        own = load_processor(folder) if there else plain_processor(replace(settings, image_size=side))
        _write(folder, read_off(own, settings).processor.to_dict())
        return f"pictures are made {side} pixels a side, as in training"
    size = detection.get("image_size")
    if isinstance(size, int) and there:
        square = {"height": size, "width": size}
        _write(folder, {**_said(folder), "size": {"max_height": size, "max_width": size}, "do_pad": True, "pad_size": square})
        return f"pictures are made to fit {size} × {size} pixels and padded to that, as in training; boxes lie in that square"
    return None


def _said(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings in a folder."""
    if (folder / OWN).is_file():
        return _json(folder / OWN)
    said = _json(folder / NESTED)
    return said.get("image_processor", said)


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put an image processor's settings where the folder has them; into a file of its own where there are none."""
    file = folder / (NESTED if (folder / NESTED).is_file() and not (folder / OWN).is_file() else OWN)
    whole: Mapping[str, Any] = settings
    if file.name == NESTED and "image_processor" in (before := _json(file)):
        whole = {**before, "image_processor": settings}
    file.write_text(json.dumps(whole, indent=2, default=list) + "\n", encoding="utf-8")


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
