"""`lorabank predict`: answers for a whole file, one column an adapter."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabank.cli.folders import chosen_path
from lorabank.cli.loading import (
    add_sampling,
    add_source,
    check_sampling,
    chosen,
    flags_of_languages,
    load,
    run_config,
    task_of,
)
from lorabank.cli.parser import CommandParser, positive
from lorabank.cli.task_options import PICTURES, TASK_FLAGS, add_task_flags, task_options
from lorabank.config.paths import expanded
from lorabank.config.tasks import DEFAULT_TASK
from lorabank.config.train import BAD_ROWS
from lorabank.config.typed import named_as_typed
from lorabank.data.answers import refuse_taken
from lorabank.data.formats import template_columns
from lorabank.errors import ConfigError, OutputError
from lorabank.wording import counted

EXAMPLES = """\
examples:
  lorabank predict out/support --data questions.jsonl --output answers.jsonl
  lorabank predict out/support --adapters formal --data table.csv --prompt 'Describe: {mr}' --output answers.jsonl
  lorabank predict out/style --prompt 'a red fox' --mix ink:0.5,oil:0.5 --output pictures
  lorabank predict out/topics --data rows.jsonl --output labels.jsonl      a run of another task: its own rows and output
  lorabank predict out/voices --data talk.mp3 --adapters ann --output talk.srt

Rows: JSONL, JSON, CSV or Parquet (columns messages, prompt, instruction, question, text), or a .txt file with a prompt
a line. Each output row is the input row and one column an adapter.
"""


OF_TEXTS = ("source_lang", "target_lang")
"""Flags that are settings of the task, for a base by itself."""
FLAGS_OF = {
    **flags_of_languages(OF_TEXTS),
    "data.test": "--data",
    "data.bad_rows": "--bad-rows",
    "threshold": "--threshold",
    "output": "--output",
    "prompt": "--prompt",
}
"""What messages call a setting that a flag gave, to the flag."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `predict`."""
    parser = subparsers.add_parser(
        "predict",
        help="answer every row of a file, one column an adapter",
        description="Answer every row of a file with each adapter, into a JSONL file.",
        epilog=EXAMPLES,
    )
    add_source(parser)
    rows = parser.add_argument_group("rows")
    rows.add_argument("--data", metavar="FILE", help="rows to answer")
    rows.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="JSONL file to write; must not exist (text-to-image: a folder, or x.png for one picture)",
    )
    rows.add_argument(
        "--prompt", metavar="TEXT", help="template from columns of text, such as 'Describe: {mr}' (default: the run's)"
    )
    rows.add_argument("--system", metavar="TEXT", help="system turn (default: the run's)")
    rows.add_argument(
        "--bad-rows",
        choices=BAD_ROWS,
        metavar="WHAT",
        help="recordings, pictures, texts to be said that can't be used: stop, or drop and count them (default: the run's)",
    )
    rows.add_argument("--max-rows", type=positive, metavar="N", help="answer only the first rows")
    rows.add_argument("--batch-size", type=positive, default=8, metavar="N", help="answers at once (default: %(default)s)")
    add_sampling(parser, temperature=TASK_FLAGS["temperature"].usual, max_new_tokens=TASK_FLAGS["max_new_tokens"].usual)
    add_task_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, generate, write row by row: an interrupted file keeps what was answered."""
    check_sampling(args)
    output, task = _new_file(args.output), task_of(args)
    options = task_options(args, task)
    data = "" if args.data is None else str(args.data)
    if args.data is None and (task == DEFAULT_TASK or "prompt" not in options):
        taken = "" if run_config(args.run_folder) else f" ({args.run_folder} is taken for {task}: --task says otherwise)"
        raise ConfigError(f"--data: the rows to answer are missing{taken}")
    if task != DEFAULT_TASK:
        return _by_task(args, output, options)
    if args.prompt is not None:
        template_columns(args.prompt, place="--prompt")
    from lorabank.models.load import check_there
    from lorabank.tasks.asked_prompts import prompts_of, read_prompts

    config = run_config(args.run_folder)
    expanded(data, place="--data")
    if not chosen_path(args.run_folder, place="RUN").exists():
        check_there(args.run_folder)  # before the rows, which would be blamed otherwise
    with named_as_typed(FLAGS_OF):
        rows = read_prompts(data, args.max_rows)
        prompts = prompts_of(rows, config, template=args.prompt, system=args.system)
    loaded = load(args)
    names = chosen(args.adapters, loaded.names)
    refuse_taken(rows, names)
    from rich.progress import track

    from lorabank import api

    size = max(1, args.batch_size // len(names))
    _append(output, [], 0, len(rows))
    for start in track(range(0, len(rows), size), description="answering"):
        jobs = [(name, prompt) for prompt in prompts[start : start + size] for name in names]
        answers = [""] * len(jobs)
        for deltas in api.generate_stream(loaded, jobs, args.max_new_tokens, args.temperature, args.top_p, args.seed + start):
            for index, delta in enumerate(deltas):
                answers[index] += delta or ""
        lines = []
        for index, row in enumerate(rows[start : start + size]):
            own = dict(zip(names, answers[index * len(names) : (index + 1) * len(names)], strict=True))
            lines.append(json.dumps({**row.values, **own}, ensure_ascii=False, default=str) + "\n")
        _append(output, lines, start, len(rows))
    print(f"{counted(len(rows), 'row')} answered by {', '.join(names)}: {output}")
    return 0


def _by_task(args: argparse.Namespace, output: Path, options: Mapping[str, Any]) -> int:
    """Predictions of a run of another task, in that task's own form."""
    from lorabank import api
    from lorabank.data.read import check_source

    if args.data is not None:
        check_source(args.data, place="--data")  # before the model is loaded
    if task_of(args) == PICTURES and (args.prompt is not None or args.data is not None):
        with named_as_typed(FLAGS_OF):
            _check_captions(args, output)
    print(f"loading {args.run_folder} …", file=sys.stderr, flush=True)
    with named_as_typed(FLAGS_OF):
        told = api.predict(
            args.run_folder,
            args.data,
            output,
            args.adapters,
            max_rows=args.max_rows,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            task=args.task,
            options={name: value for name, value in options.items() if name not in OF_TEXTS},
            settings={name: value for name, value in options.items() if name in OF_TEXTS},
            say=lambda line: print(line, file=sys.stderr),
        )
    print(told)
    return 0


def _check_captions(args: argparse.Namespace, output: Path) -> None:
    """Raise DataError for what holds no captions, and ConfigError where a picture's file is named and several are asked for."""
    from lorabank.tasks.diffusion.prompts import one_file, read_captions
    from lorabank.training.base_rows import BASE_NAME
    from lorabank.training.source import adapter_folders

    names = args.adapters or [*adapter_folders(chosen_path(args.run_folder, place="RUN")), BASE_NAME]
    captions = read_captions(args.data, args.max_rows) if args.prompt is None else [args.prompt]
    one_file(output, captions, [*names, *(args.mix or [])])


def _new_file(name: str) -> Path:
    """The path of a file that can be made. Raises OutputError for one that exists, or that no folder can hold."""
    path = expanded(name, place="--output")
    if path.exists():
        raise OutputError(f"{path}: exists already. Choose another --output.")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"{path}: {str(above)!r} is a file, not a folder. Choose another --output.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: nothing may be written in {str(above)!r}. Choose another --output.")
    return path


def _append(path: Path, lines: Sequence[str], done: int, total: int) -> None:
    """Add whole lines, or none: where the disk fills up, the file keeps the `done` rows before them. Raises OutputError."""
    from lorabank.formats.files import utf8

    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab" if lines else "xb") as file:
            size = file.tell()
            file.write(utf8("".join(lines)))
    except OSError as error:
        if lines:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise OutputError(
            f"{path}: {error.strerror}. {done} of {counted(total, 'row')} are complete in it. Free some space, and choose "
            "another --output or delete the file."
        ) from error
