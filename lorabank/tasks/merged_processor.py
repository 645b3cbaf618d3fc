"""A merged model's image processor: what the adapter was trained with, where that differs from the base's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorabank.config.images import ImagesConfig
from lorabank.formats.adapter import Adapter
from lorabank.formats.task_settings import task_settings
from lorabank.models.image_processors import settings_file, settings_of, write_settings
from lorabank.tasks.images.kept import KEPT as IMAGES
from lorabank.tasks.images.load import size_of
from lorabank.tasks.images.preprocess import load_processor, plain_processor, read_off


def fit_processor(folder: Path, adapter: Adapter) -> str | None:
    """Make the processor in a merged model's folder give pictures of the adapter's size; a sentence on it, None: as it was."""
    images, detection = task_settings(adapter, "images"), task_settings(adapter, "detection")
    there = settings_file(folder) is not None
    if images and (images.get("image_size") is not None or not there):
        settings: ImagesConfig = IMAGES.merged(ImagesConfig(), {"adapter": adapter})
        side = settings.image_size or size_of(_json(folder / "config.json").get("image_size"))
        own = load_processor(folder) if there else plain_processor(replace(settings, image_size=side))
        write_settings(folder, read_off(own, settings).processor.to_dict())
        return f"pictures are made {side} pixels a side, as in training"
    size = detection.get("image_size")
    if isinstance(size, int) and there:
        square = {"height": size, "width": size}
        wide = {"size": {"max_height": size, "max_width": size}, "do_pad": True, "pad_size": square}
        write_settings(folder, {**settings_of(folder), **wide})
        return f"pictures are made to fit {size} × {size} pixels and padded to that, as in training; boxes lie in that square"
    return None


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
