"""Kinds of work: their names, and the sections of settings that they have beside those of every run."""

from __future__ import annotations

import json
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
from lorabank.errors import ConfigError

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


TASK_FILE = "lorabank_task.json"
"""In a merged model's folder: `task`, and `settings` of its section that the adapter was trained and is used with."""


def task_of_model(folder: Path) -> str | None:
    """The task of a model's folder, where its files alone say it: a pipeline of diffusers, or what an adapter was merged into."""
    return form_of_model(folder) or merged_task(folder)[0]


def form_of_model(folder: Path) -> str | None:
    """The task whose models alone come in this form: a pipeline of diffusers, or a merged classifier of another library."""
    return next((task for file, task in MODEL_FILES.items() if (folder / file).is_file()), None)


def merged_task(folder: Path) -> tuple[str | None, Mapping[str, Any]]:
    """(task, settings of its section) that a merged model's folder says; (None, {}) where it says nothing.

    Raises ConfigError for a file that can't be read.
    """
    file = folder / TASK_FILE
    if not file.is_file():
        return None, {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        task, settings = said["task"], said.get("settings", {})
        if task not in SECTION_OF or not isinstance(settings, dict):
            raise ValueError(f"no task {task!r}")
        TASK_SECTIONS[SECTION_OF[task]](**settings)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file}: what the merged model is for can't be read ({error}). Merge again, or delete the file and name --task."
        ) from error
    return task, settings
