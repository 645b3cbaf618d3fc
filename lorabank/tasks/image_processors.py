"""What prepares pictures, for the tasks that take them: an image processor of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin

from lorabank.models.image_processors import settings_file
from lorabank.tasks.images.preprocess import load_processor
from lorabank.training.processors import ProcessorKind


def _is_image_processor(given: object) -> bool:
    return isinstance(given, ImageProcessingMixin)


def _beside(folder: Path) -> Any:
    return load_processor(folder) if settings_file(folder) is not None else None


IMAGE_PROCESSOR = ProcessorKind(
    expected="an image processor of transformers, such as AutoImageProcessor.from_pretrained(…), or ViTImageProcessor(…)",
    accepts=_is_image_processor,
    beside=_beside,
)
