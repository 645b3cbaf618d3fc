"""`lorabank combine`: several adapters of one base into one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.cli.folders import chosen_path, refuse_existing, whole_folder
from lorabank.cli.parser import CommandParser, positive
from lorabank.errors import ConfigError, MergeError
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.merging.weights import Weights

EXAMPLES = """\
examples:
  lorabank combine out/support/formal:0.7 out/support/terse:0.3 --output out/mixed
  lorabank combine good:1 bad:-0.5 --output out/difference
  lorabank combine formal:0.5 terse:0.5 --method svd --rank 16 --output out/small
  lorabank combine formal terse -w 0.7 -w 'layers.0-3=0.2,mlp=0.8,*=0.5' --output out/by-layer

methods: exact (the weighted sum of the changes; ranks add up), svd (the best of a rank), ties, dare, dare_ties, magnitude_prune.
PEFT's names of them (cat, ties_svd, dare_linear_svd …) are understood too.

A weight is a number, or PART=NUMBER with commas between: names in a layer's path (mlp, layers.0-3, *), the first that matches
counts; or kohya's block weights of a U-Net (12, 17, 20 or 26 numbers with commas between).
"""
PATIENCE = 2.0
"""Seconds after which a bar is shown."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `combine`."""
    parser = subparsers.add_parser(
        "combine",
        help="weighted sum of adapters, as one adapter",
        description="Put several adapters of one base together, each with a weight, into one adapter.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "parts", metavar="ADAPTER:WEIGHT", nargs="+", help="adapter folder (or FOLDER:NAME of several in it) and its weight"
    )
    parser.add_argument(
        "-w",
        "--weights",
        metavar="WEIGHT",
        action="append",
        default=[],
        help="weight of an adapter, once for each in their order, in place of :WEIGHT",
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="adapter folder to write; must not exist")
    parser.add_argument("--method", default="exact", metavar="NAME", help="how (default: %(default)s)")
    limited = parser.add_argument_group("methods of a limited rank")
    limited.add_argument(
        "--rank", type=positive, metavar="N", help="of each layer at most (default: the largest of the adapters)"
    )
    limited.add_argument("--energy", type=float, metavar="X", help="share of ‖ΔW‖² to hold, with as few ranks as will do")
    limited.add_argument("--density", type=float, metavar="X", help="share of the numbers that ties, dare … keep (default: 0.5)")
    limited.add_argument("--seed", type=int, metavar="N", help="of dare's draws (default: 0)")
    limited.add_argument("--majority-sign-method", metavar="NAME", help="of ties: total (default) or frequency")
    return parser


def run(args: argparse.Namespace) -> int:
    """Load, combine, save in PEFT's format, say how far it is from the exact sum."""
    parts = weighted(args.parts, args.weights)
    folder = refuse_existing(args.output)
    from lorabank.formats.adapter import Adapter
    from lorabank.merging.combine import combine_and_measure

    with _LateBar() as bar:
        combined = combine_and_measure(
            [(Adapter.load(path), weight) for path, weight in parts],
            args.method,
            rank=args.rank,
            energy=args.energy,
            density=args.density,
            seed=args.seed,
            majority_sign_method=args.majority_sign_method,
            names=[path for path, _ in parts],
            busy=bar,
        )
    with whole_folder(folder) as scratch:
        combined.adapter.save(scratch)
    report = combined.report
    low, high = report.ranks
    span = str(low) if low == high else f"{low} to {high}"
    print(report)
    print(
        f"saved: {folder} ({counted(len(report.layers), 'layer')}, rank {span}, {combined.adapter.num_parameters:,} parameters)"
    )
    return 0


def weighted(parts: Sequence[str], weights: Sequence[str]) -> list[tuple[str, Weights]]:
    """Folders with their weights, `folder:0.7` or by `-w`. Raises ConfigError."""
    if not weights:
        return [split_weight(part) for part in parts]
    if len(weights) != len(parts):
        raise ConfigError(f"-w: expected one for each of {counted(len(parts), 'adapter')}, in their order, got {len(weights)}")
    return [(path, _weight(text, "-w")) for path, text in zip(parts, weights, strict=True)]


def split_weight(text: str) -> tuple[str, Weights]:
    """`folder:0.7` or `folder:mlp=0.7,*=1` as a pair. Raises ConfigError without a weight."""
    from lorabank.formats.choice import adapters_in

    path, _, weight = text.rpartition(":")
    folder = chosen_path(path, place="ADAPTER") if path else Path(text)
    if path and folder.is_dir() and weight in adapters_in(folder):
        raise ConfigError(f"{text}: names an adapter of a folder and no weight: {text}:1, or -w for each adapter")
    if not path:
        raise ConfigError(f"{text}: expected ADAPTER:WEIGHT, such as out/support/formal:0.7, or -w for each adapter")
    return path, _weight(weight, f"{text}: expected ADAPTER:WEIGHT")


def _weight(text: str, place: str) -> Weights:
    from lorabank.merging.weights import from_text

    try:
        return from_text(text)
    except MergeError as error:
        raise ConfigError(f"{place}: {error}") from error


class _LateBar:
    """A progress bar for what takes more than two seconds."""

    def __init__(self) -> None:
        from lorabank.training.busy import BusyBar

        self._bar = BusyBar()
        self._began = time.monotonic()

    def __enter__(self) -> _LateBar:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._bar.__exit__(None, None, None)

    def __call__(self, activity: str, done: int, total: int) -> None:
        if time.monotonic() - self._began > PATIENCE:
            self._bar(activity, done, total)
