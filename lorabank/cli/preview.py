"""`lorabank preview`: what the model will see and be trained on, before any training."""

from __future__ import annotations

import argparse

from lorabank.cli.parser import CommandParser
from lorabank.cli.train import add_run_options, print_notes
from lorabank.config.flags import parse_train_arguments
from lorabank.config.typed import named_as_typed
from lorabank.errors import ConfigError

EXAMPLES = """\
examples:
  lorabank preview --model Qwen/Qwen3-0.6B --data chat.jsonl
  lorabank preview run.yaml --count 5

Takes the same file and flags as `lorabank train`.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Help only: the words themselves are read by `parse_train_arguments`."""
    parser = subparsers.add_parser(
        "preview",
        help="print rows as the model will see them, the trained tokens coloured",
        description="Print a few rows as the model will see them, the trained tokens coloured. Nothing is trained.",
        usage="lorabank preview [FILE] [--model MODEL] [--data ROWS] [--count N] [--setting value …]",
        epilog=EXAMPLES,
        keep_words=True,
    )
    parser.add_argument("--count", metavar="N", help="rows of each adapter (default: 3)")
    add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read the line and print the rows."""
    if not args.arguments:
        print(EXAMPLES, end="")
        return 0
    words, count = _take_count(args.arguments)
    parsed = parse_train_arguments(words)
    print_notes([note for note in parsed.notes if not note.startswith("output:")])
    from lorabank import api

    with named_as_typed(parsed.flags):
        api.preview(parsed.config, count=count)
    return 0


def _take_count(words: list[str]) -> tuple[list[str], int]:
    rest, count = [], "3"
    pending = iter(words)
    for word in pending:
        if word == "--count" or word.startswith("--count="):
            count = word.partition("=")[2] or next(pending, "")
        else:
            rest.append(word)
    if not count.isdigit() or int(count) < 1:
        raise ConfigError(f"--count: expected a whole number ≥ 1, got {count!r}")
    return rest, int(count)
