"""Kinds of work: their names, and the sections of settings that they have beside those of every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorabank.config.classification import ClassificationConfig
from lorabank.config.detection import DetectionConfig
from lorabank.config.diffusion import DiffusionConfig, adapter_defaults
from lorabank.config.images import ImagesConfig
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig

DEFAULT_TASK = "text-generation"
TASKS = (
    DEFAULT_TASK,
    "text-classification",
    "summarization",
    "translation",
    "text2text-generation",
    "image-classification",
    "object-detection",
    "automatic-speech-recognition",
    "text-to-speech",
    "text-to-image",
)
"""By the names of transformers' pipelines."""
TASK_SECTIONS: Mapping[str, type] = {
    "classification": ClassificationConfig,
    "seq2seq": Seq2SeqConfig,
    "images": ImagesConfig,
    "detection": DetectionConfig,
    "speech": SpeechConfig,
    "synthesis": SynthesisConfig,
    "diffusion": DiffusionConfig,
}
"""Section of a configuration file to its settings; each is a field of `TrainConfig` too."""
SECTION_OF: Mapping[str, str] = {
    "text-classification": "classification",
    "summarization": "seq2seq",
    "translation": "seq2seq",
    "text2text-generation": "seq2seq",
    "image-classification": "images",
    "object-detection": "detection",
    "automatic-speech-recognition": "speech",
    "text-to-speech": "synthesis",
    "text-to-image": "diffusion",
}
"""Task to the section that it reads; no task reads another's."""
TASK_DEFAULTS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {"text-to-image": adapter_defaults}
"""Task to what its adapters have where nobody says otherwise, by the settings of its own section."""
TASK_SHORTHANDS: Mapping[str, str] = dict.fromkeys(("save_format", "resolution", "min_snr", "noise_offset"), "diffusion")
"""Settings of a task that may stand at the top, by themselves on a command line: no other section has one of the name."""
MODEL_FILES: Mapping[str, str] = {"model_index.json": "text-to-image", "classifier.json": "image-classification"}
"""File in a model's folder that only one task's models have → the task."""


def task_of_model(folder: Path) -> str | None:
    """The task of a model's folder, where its files alone say it: a pipeline of diffusers, or a merged classifier."""
    return next((task for file, task in MODEL_FILES.items() if (folder / file).is_file()), None)
