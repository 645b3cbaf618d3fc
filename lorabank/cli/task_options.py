"""Flags of `lorabank predict` that one task alone has."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lorabank.cli.parser import CommandParser
from lorabank.errors import ConfigError

SPEECH, DETECTION = "automatic-speech-recognition", "object-detection"
TASK_OPTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "timestamps": (SPEECH, {"action": "store_true", "help": "transcripts with times (default: where the file's kind has them)"}),
    "language": (SPEECH, {"metavar": "NAME", "help": "language that is spoken (default: the run's)"}),
    "threshold": (
        DETECTION,
        {
            "type": float,
            "metavar": "SCORE",
            "help": "lowest score of a box (default: all are written, detection.threshold's drawn)",
        },
    ),
    "draw": (DETECTION, {"type": int, "metavar": "N", "help": "pictures that are drawn with their boxes (default: 20)"}),
}
"""Option to its task and what argparse is told."""


SHARED: Mapping[str, tuple[str, ...]] = {
    "max_new_tokens": ("summarization", "translation", "text2text-generation"),
}
"""Flags of text generation that these tasks take too."""


def add_task_options(parser: CommandParser) -> None:
    """A group of flags a task."""
    for task in dict.fromkeys(task for task, _ in TASK_OPTIONS.values()):
        group = parser.add_argument_group(task)
        for name, (own, says) in TASK_OPTIONS.items():
            if own == task:
                group.add_argument(f"--{name.replace('_', '-')}", **says)


def task_options(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """What was given of them. Raises ConfigError for one of another task."""
    given = {name: getattr(args, name) for name in TASK_OPTIONS if getattr(args, name) not in (None, False)}
    for name in given:
        if TASK_OPTIONS[name][0] != task:
            raise ConfigError(f"--{name.replace('_', '-')}: is for {TASK_OPTIONS[name][0]}, and this is {task}.")
    return given | {name: getattr(args, name) for name, tasks in SHARED.items() if task in tasks}
