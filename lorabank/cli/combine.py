"""`lorabank combine`: several adapters of one base into one."""

from __future__ import annotations

import argparse
import math

from lorabank.cli.folders import refuse_existing, whole_folder
from lorabank.cli.parser import CommandParser
from lorabank.errors import ConfigError

EXAMPLES = """\
examples:
  lorabank combine out/support/formal:0.7 out/support/terse:0.3 --output out/mixed
  lorabank combine good:1 bad:-0.5 --output out/difference

`exact`: the change is exactly the weighted sum of the changes; ranks add up.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `combine`."""
    parser = subparsers.add_parser(
        "combine",
        help="weighted sum of adapters, as one adapter",
        description="Put several adapters of one base together, each with a weight, into one adapter.",
        epilog=EXAMPLES,
    )
    parser.add_argument("parts", metavar="ADAPTER:WEIGHT", nargs="+", help="adapter folder and its weight")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="adapter folder to write; must not exist")
    parser.add_argument("--method", default="exact", metavar="NAME", help="how (default: %(default)s, the only one so far)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Load, combine, save in PEFT's format."""
    parts = [split_weight(part) for part in args.parts]
    folder = refuse_existing(args.output)
    from lorabank.formats.adapter import Adapter
    from lorabank.merging.combine import combine

    result = combine([(Adapter.load(path), weight) for path, weight in parts], method=args.method)
    with whole_folder(folder) as scratch:
        result.save(scratch)
    ranks = sorted({layer.rank for layer in result.layers.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(f"saved: {folder} ({len(result.layers)} layers, rank {span}, {result.num_parameters:,} parameters)")
    return 0


def split_weight(text: str) -> tuple[str, float]:
    """`folder:0.7` as a pair. Raises ConfigError without a finite weight."""
    path, _, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise ConfigError(f"{text}: expected ADAPTER:WEIGHT, such as out/support/formal:0.7")
    return path, value
