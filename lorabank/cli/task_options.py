"""Flags of `lorabank predict` that only some tasks take: one table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorabank.cli.parser import CommandParser, positive
from lorabank.config.tasks import DEFAULT_TASK
from lorabank.errors import ConfigError

SPEECH, DETECTION, PICTURES = "automatic-speech-recognition", "object-detection", "text-to-image"
SYNTHESIS, IMAGES = "text-to-speech", "image-classification"
SEQ2SEQ = ("summarization", "translation", "text2text-generation")


@dataclass(frozen=True, kw_only=True)
class TaskFlag:
    """One flag."""

    tasks: tuple[str, ...]
    """Those that take it."""
    usual: Any = None
    """Its value where it isn't given. A task that takes the flag is told this too; None tells it nothing."""
    says: Mapping[str, Any] | None = None
    """What argparse is told; None for a flag that stands in a group of the command itself."""


def size(text: str) -> tuple[int, int]:
    """`768x512` → (768, 512); `512` is a square."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 768x512, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _own(task: str, **says: Any) -> TaskFlag:
    return TaskFlag(tasks=(task,), says=says)


TASK_FLAGS: Mapping[str, TaskFlag] = {
    "prompt": TaskFlag(tasks=(DEFAULT_TASK, PICTURES)),
    "system": TaskFlag(tasks=(DEFAULT_TASK,)),
    "bad_rows": TaskFlag(tasks=(SPEECH, SYNTHESIS, IMAGES, DETECTION)),
    "max_new_tokens": TaskFlag(tasks=(DEFAULT_TASK, *SEQ2SEQ), usual=256),
    "temperature": TaskFlag(tasks=(DEFAULT_TASK,), usual=0.0),
    "top_p": TaskFlag(tasks=(DEFAULT_TASK,), usual=1.0),
    "seed": TaskFlag(tasks=(DEFAULT_TASK, PICTURES), usual=42),
    "beams": TaskFlag(
        tasks=(*SEQ2SEQ, SPEECH),
        says={"type": positive, "metavar": "N", "help": "beams that texts are written with; 1 is greedy (default: the run's)"},
    ),
    "source_lang": TaskFlag(tasks=SEQ2SEQ, says={"metavar": "NAME", "help": "of a base by itself: language that is read"}),
    "target_lang": TaskFlag(tasks=SEQ2SEQ, says={"metavar": "NAME", "help": "of a base by itself: language that is written"}),
    "timestamps": _own(
        SPEECH, action="store_const", const=True, help="transcripts with times (default: where the file's kind has them)"
    ),
    "language": _own(SPEECH, metavar="NAME", help="language that is spoken (default: the run's)"),
    "threshold": _own(
        DETECTION,
        type=float,
        metavar="SCORE",
        help="lowest score of a box (default: all are written, detection.threshold's drawn)",
    ),
    "draw": _own(DETECTION, type=int, metavar="N", help="pictures that are drawn with their boxes (default: 20)"),
    "mix": _own(PICTURES, action="append", metavar="A:X,B:Y", help="a mixture of adapters beside them, such as a:0.5,b:0.5"),
    "steps": _own(PICTURES, type=positive, metavar="N", help="of the scheduler (default: the run's)"),
    "guidance": _own(PICTURES, type=float, metavar="X", help="classifier-free guidance (default: the run's)"),
    "size": _own(PICTURES, type=size, metavar="WxH", help="pixels (default: the run's)"),
    "negative": _own(PICTURES, metavar="TEXT", help="what guidance leads away from (default: the run's)"),
}
HEADINGS: Mapping[str, str] = {
    PICTURES: f"{PICTURES} (--prompt draws one caption, --seed its noise)",
    SEQ2SEQ[0]: ", ".join((*SEQ2SEQ, SPEECH)),
}
"""Of a task's group in the help, where its name alone says too little."""


def add_task_flags(parser: CommandParser) -> None:
    """A group of flags a task."""
    own = {name: flag for name, flag in TASK_FLAGS.items() if flag.says is not None}
    for task in dict.fromkeys(flag.tasks[0] for flag in own.values()):
        group = parser.add_argument_group(HEADINGS.get(task, task))
        for name, flag in own.items():
            if flag.tasks[0] == task:
                group.add_argument(f"--{name.replace('_', '-')}", **(flag.says or {}))


def task_options(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """What `task` is told of them. Raises ConfigError for one that was given and is for other tasks, or is out of range."""
    told: dict[str, Any] = {}
    for name, flag in TASK_FLAGS.items():
        value = getattr(args, name)
        if task in flag.tasks:
            told |= {} if value is None else {name: value}
        elif value != flag.usual:
            tasks = ", ".join(flag.tasks)
            raise ConfigError(f"--{name.replace('_', '-')}: is for {tasks}, and this run's task is {task}. Leave it out.")
    guidance = told.get("guidance")
    if guidance is not None and not 0 <= guidance <= 100:
        raise ConfigError(f"--guidance: expected a number from 0 to 100, got {guidance}")
    if task == PICTURES and args.prompt is not None and args.data is not None:
        raise ConfigError("--prompt: draws one caption, and --data captions of a file. Give one of them.")
    return told
