"""A base detector and its image processor, from names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorabank.bank.in_full.heads import DETECTORS, detector_heads
from lorabank.errors import ConfigError, ModelError, closest
from lorabank.models.image_processors import processor_class, settings_file
from lorabank.models.load_class import load_class
from lorabank.training.task import BaseRequest, Say, TaskBase


def load_detector(request: BaseRequest, say: Say) -> TaskBase:
    """Any of transformers' …ForObjectDetection that is known. Raises ModelError and ConfigError."""
    from transformers import AutoModelForObjectDetection

    base = load_class(
        request.model,
        AutoModelForObjectDetection,
        image_processor_of,
        dtype=request.dtype,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        say=say,
    )
    check_detector(base.model, request.model)
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def check_detector(model: Any, name: str) -> None:
    """Raise ConfigError for a model whose head isn't known."""
    if detector_heads(model):
        return
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    two_stage = ", with two_stage: its proposals would come from other categories' heads"
    why = two_stage if kind in DETECTORS else closest(kind, DETECTORS)
    known = ", ".join(DETECTORS)
    raise ConfigError(f"model {name!r}: object-detection is for detectors of the type {known}, got {kind!r}{why}.")


def image_processor_of(name: str, folder: Path) -> Any:
    """The image processor in a model's folder, by Pillow. Raises ModelError."""
    if settings_file(folder) is None:
        raise ModelError(
            f"model {name!r}: has no preprocessor_config.json, which says how pictures are scaled and normalised. Copy that of "
            "the model that it was made from, or save an image processor there (DetrImageProcessor().save_pretrained)."
        )
    try:
        return processor_class(folder).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged or exotic file surfaces as almost any class
        raise ModelError(f"model {name!r}: its image processor can't be read: {str(error).splitlines()[0]}") from error
