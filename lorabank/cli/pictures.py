"""What `lorabank predict` can be told of pictures: who draws, and how."""

from __future__ import annotations

import argparse
from typing import Any

from lorabank.cli.parser import CommandParser, positive
from lorabank.errors import ConfigError

TASK = "text-to-image"
FLAGS = ("mix", "steps", "guidance", "size", "negative")
"""Those that only pictures have."""


def add_pictures(parser: CommandParser) -> None:
    """Flags of image generation."""
    group = parser.add_argument_group("pictures (text-to-image; --prompt draws one caption, --seed its noise)")
    group.add_argument("--mix", action="append", metavar="A:X,B:Y", help="a mixture of adapters beside them, such as a:0.5,b:0.5")
    group.add_argument("--steps", type=positive, metavar="N", help="of the scheduler (default: the run's)")
    group.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance (default: the run's)")
    group.add_argument("--size", type=size, metavar="WxH", help="pixels (default: the run's)")
    group.add_argument("--negative", metavar="TEXT", help="what guidance leads away from (default: the run's)")


def size(text: str) -> tuple[int, int]:
    """`768x512` → (768, 512); `512` is a square."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 768x512, got {text!r}")
    return int(sides[0]), int(sides[-1])


def picture_options(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """What was given of them. Raises ConfigError where the run is of another task."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if task != TASK:
        if given:
            raise ConfigError(f"--{next(iter(given))}: is for {TASK}, and this is {task}.")
        return {}
    if args.guidance is not None and not 0 <= args.guidance <= 100:
        raise ConfigError(f"--guidance: expected a number from 0 to 100, got {args.guidance}")
    if args.prompt is not None and args.data is not None:
        raise ConfigError("--prompt: draws one caption, and --data captions of a file. Give one of them.")
    if args.system is not None:
        raise ConfigError(f"--system: is for text generation, and this is {task}.")
    return given | {"seed": args.seed} | ({} if args.prompt is None else {"prompt": args.prompt})
