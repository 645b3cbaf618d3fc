"""`lorabank eval`: base and adapters scored on the same held-out rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorabank.cli.loading import (
    LANGUAGES,
    add_languages,
    add_source,
    check_languages,
    flags_of_languages,
    languages_of,
    run_config,
    task_of,
)
from lorabank.cli.parser import CommandParser, names, positive
from lorabank.config.paths import expanded
from lorabank.config.train import BAD_ROWS, DataConfig
from lorabank.config.typed import named_as_typed
from lorabank.errors import ConfigError, OutputError

EXAMPLES = """\
examples:
  lorabank eval out/support                                         the run's own held-out rows
  lorabank eval out/support --adapters formal,terse,base --data test.jsonl --metrics loss,bleu,chrf
  lorabank eval Qwen/Qwen3-0.6B --data test.jsonl --metrics mymetrics:politeness

metrics: loss, perplexity, exact_match, bleu, chrf, rouge, or module:function. Other tasks have their own, such as
accuracy, f1, wer, cer, mAP: a name that a task doesn't know is answered with all of its names.
"""

BAD_ROW_FLAGS = {
    "nan_rows": "rows with NaN in a column that is used",
    "bad_rows": "rows that can't be used otherwise",
}
"""Settings of `data` that are flags too, to what they are about."""
FLAGS_OF = {"data.test": "--data", **{f"data.{name}": f"--{name.replace('_', '-')}" for name in BAD_ROW_FLAGS}}
"""What messages call a setting of the rows of --data, to the flag."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="score the base and adapters on held-out rows",
        description="Score the base and adapters on the same held-out rows and print one table.",
        epilog=EXAMPLES,
    )
    add_source(parser)
    add_languages(parser, tuple(LANGUAGES))
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--data", metavar="ROWS", help="file, folder or datasets id (default: the run's test rows, else validation rows)"
    )
    for name, what in BAD_ROW_FLAGS.items():
        rows.add_argument(
            f"--{name.replace('_', '-')}",
            choices=BAD_ROWS,
            metavar="WHAT",
            help=f"of --data, {what}: stop with an error that names them, or drop and count them (default: the run's, else "
            f"{getattr(DataConfig, name)})",
        )
    rows.add_argument("--metrics", type=names, metavar="NAMES", help="commas between (default: the run's, else loss)")
    rows.add_argument(
        "--max-rows", type=positive, metavar="N", help="score at most N rows, and answers to N prompts, spread evenly"
    )
    rows.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the run's, else 128)")
    rows.add_argument("--batch-size", type=positive, default=8, metavar="N", help="rows a pass (default: %(default)s)")
    rows.add_argument("--json", metavar="FILE", help="write the scores there too")
    return parser


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    config = run_config(args.run_folder)
    own = languages_of(args, tuple(LANGUAGES))
    check_languages(own, task_of(args))
    if config is None and not args.data:
        raise ConfigError(f"--data: missing. {args.run_folder} holds no run whose held-out rows could be used.")
    bad = {name: said for name in BAD_ROW_FLAGS if (said := getattr(args, name)) is not None}
    if bad and not args.data:
        flag = f"--{next(iter(bad)).replace('_', '-')}"
        raise ConfigError(
            f"{flag}: is for the rows of --data, and a run's own rows are read as it read them. Name some, or leave it out."
        )
    data = replace(config.data if config else DataConfig(), **bad)
    if args.data:
        data = replace(data, train=None, val=None, test=args.data, val_split=0, test_split=0, limit=None)
        from lorabank.data.read import check_source

        check_source(args.data, place="--data")  # before the model is loaded
    metrics = args.metrics or list(config.eval.metrics if config else ("loss",))
    json_file = _writable(args.json) if args.json else None
    from lorabank import api

    typed = flags_of_languages(tuple(LANGUAGES)) | (FLAGS_OF if args.data else {})
    typed |= {"eval.metrics": "--metrics"} if args.metrics else {}
    with named_as_typed(typed):
        scores = api.evaluate(
            args.run_folder,
            data,
            args.adapters,
            metrics=metrics,
            max_rows=args.max_rows,
            max_new_tokens=args.max_new_tokens or (config.eval.max_new_tokens if config else 128),
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            task=args.task,
            settings=own,
            say=lambda line: print(line, file=sys.stderr),
        )
    print_scores(scores)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--json {args.json}: can't be written ({error.strerror}). The scores are in the table.") from error
    return 0


def _writable(name: str) -> Path:
    """The file for the scores; raises OutputError, before anything is scored, where it can't be made."""
    path = expanded(name, place="--json")
    if path.is_dir():
        raise OutputError(f"--json {name}: expected a file, got a folder. Add a name, such as {path / 'scores.json'}.")
    if not path.parent.is_dir():
        raise OutputError(f"--json {name}: there is no folder {str(path.parent)!r}. Make it first, or choose another file.")
    return path


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    """One row a model, the best of each column bold."""
    from rich.console import Console

    from lorabank.training.tables import metrics_table

    console = Console()
    console.print(metrics_table(scores, width=console.width))
