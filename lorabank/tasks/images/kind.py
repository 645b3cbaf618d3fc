"""The entry of image classification in the table of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorabank.config.train import TrainConfig
from lorabank.formats.adapter import Adapter
from lorabank.tasks.image_processors import IMAGE_PROCESSOR
from lorabank.tasks.images.load import NO_PROCESSOR, load_image_model
from lorabank.tasks.images.predict import check_output
from lorabank.tasks.images.task import ImageClassification, check_metrics
from lorabank.training.task import BaseRequest, Say, TaskBase, TaskKind


def _load(request: BaseRequest, say: Say) -> TaskBase:
    base = load_image_model(
        request.model, dtype=request.dtype, device=request.device, trust_remote_code=request.trust_remote_code, say=say
    )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> ImageClassification:
    return ImageClassification(config, model, processor, adapters)


KIND = TaskKind(
    load=_load,
    open=_open,
    check_metrics=check_metrics,
    processor=replace(IMAGE_PROCESSOR, without=NO_PROCESSOR.format(what="no image processor given")),
    check_output=check_output,
)
