"""Kinds of work over the same bank and trainer, a room each. `TASKS` is the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from lorabank.errors import ConfigError, closest
from lorabank.training.task import TaskKind

TASKS: Mapping[str, str] = {
    "text-generation": "lorabank.tasks.text_generation",
    "text-classification": "lorabank.tasks.text_classification",
    "summarization": "lorabank.tasks.seq2seq.summarization",
    "translation": "lorabank.tasks.seq2seq.translation",
    "text2text-generation": "lorabank.tasks.seq2seq",
    "automatic-speech-recognition": "lorabank.tasks.speech.task",
    "text-to-speech": "lorabank.tasks.synthesis",
    "image-classification": "lorabank.tasks.images.kind",
    "object-detection": "lorabank.tasks.detection",
    "text-to-image": "lorabank.tasks.diffusion",
}
"""Name to the module whose `KIND` it is; imported when it is used, since each has libraries of its own."""


def task_kind(name: str) -> TaskKind:
    """How a task is loaded and opened. Raises ConfigError for an unknown name."""
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {name!r}{closest(name, TASKS)}")
    return cast("TaskKind", importlib.import_module(TASKS[name]).KIND)
