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
  lorabank preview --task image-classification --model efficientnet-lite0 --data pictures/ --pictures look/

Takes the same file and flags as `lorabank train`. What is no text (pictures, boxes, spectra) is drawn into a folder.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Help only: the words themselves are read by `parse_train_arguments`."""
    parser = subparsers.add_parser(
        "preview",
        help="show rows as the model will see them: trained tokens coloured, pictures and sounds drawn",
        description="Show a few rows as the model will see them. Nothing is trained.",
        usage="lorabank preview [FILE] [--model MODEL] [--data ROWS] [--count N] [--pictures FOLDER] [--setting value …]",
        epilog=EXAMPLES,
        keep_words=True,
    )
    parser.add_argument("--count", metavar="N", help="rows of each data set (default: 3)")
    parser.add_argument("--pictures", metavar="FOLDER", help="where pictures of rows are written (default: lorabank-preview)")
    add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read the line and print the rows."""
    if not args.arguments:
        print(EXAMPLES, end="")
        return 0
    count, words = _taken("--count", args.arguments, "3")
    if not count.isdigit() or int(count) < 1:
        raise ConfigError(f"--count: expected a whole number ≥ 1, got {count!r}")
    pictures, words = _taken("--pictures", words, "lorabank-preview")
    if not pictures:
        raise ConfigError("--pictures: expected a folder")
    parsed = parse_train_arguments(words)
    print_notes([note for note in parsed.notes if not note.startswith("output:")])
    from lorabank import api

    with named_as_typed(parsed.flags):
        api.preview(parsed.config, count=int(count), pictures=pictures)
    return 0


def _taken(flag: str, words: list[str], default: str) -> tuple[str, list[str]]:
    """(the value of a flag that isn't one of training's, the other words)."""
    rest, value = [], default
    pending = iter(words)
    for word in pending:
        if word == flag or word.startswith(f"{flag}="):
            value = word.partition("=")[2] or next(pending, "")
        else:
            rest.append(word)
    return value, rest
