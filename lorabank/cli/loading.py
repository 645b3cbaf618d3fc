"""What the commands that talk to a trained run share: its flags, its own settings, and loading it with a word about it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.cli.folders import chosen_path
from lorabank.cli.parser import CommandParser, names, positive
from lorabank.cli.train import print_notes
from lorabank.config.checks import check_choice
from lorabank.config.convert import dtype_name
from lorabank.config.tasks import DEFAULT_TASK, SECTION_OF, TASKS, task_of_model
from lorabank.config.train import TrainConfig
from lorabank.errors import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from lorabank.training.loaded import LoadedRun

BASE_NAME = "base"


def add_source(parser: CommandParser, example: str = "out/support") -> None:
    """The run and the adapters."""
    parser.add_argument("run_folder", metavar="RUN", help=f"run folder such as {example}, an adapter folder, or a base model")
    parser.add_argument(
        "--adapters",
        metavar="NAMES",
        type=names,
        help="which, commas between; `base` is the model without (default: all and base)",
    )
    parser.add_argument("--task", metavar="TASK", help="of a plain base model (default: the run's, else text-generation)")
    add_machine(parser)


LANGUAGES = {"language": "that is spoken", "source_lang": "of texts that are read", "target_lang": "of texts that are written"}
"""Settings of a base by itself; runs and adapters have their own."""
SECTIONS = {"language": "speech", "source_lang": "seq2seq", "target_lang": "seq2seq"}


def add_languages(parser: CommandParser, names: Sequence[str]) -> None:
    """Flags of `LANGUAGES`."""
    group = parser.add_argument_group("a base model by itself (a run and an adapter say theirs)")
    for name in names:
        group.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help=f"language {LANGUAGES[name]}")


def languages_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Those that were typed."""
    return {name: said for name in names if (said := getattr(args, name)) is not None}


def check_languages(given: Collection[str], task: str) -> None:
    """Raise ConfigError for a language of `LANGUAGES` that was typed for a task that has no such one."""
    for name in given:
        tasks = [each for each, section in SECTION_OF.items() if section == SECTIONS[name]]
        if task not in tasks:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: is for {', '.join(tasks)}, and this run's task is {task}. Leave it out.")


def flags_of_languages(names: Sequence[str]) -> dict[str, str]:
    """What messages call them, to the flag."""
    return {f"{SECTIONS[name]}.{name}": f"--{name.replace('_', '-')}" for name in names}


def task_of(args: argparse.Namespace) -> str:
    """The task of what is named: as it was asked for, the run's, or what the adapter's own file says. Loads no model."""
    if args.task is not None:
        check_choice("--task", args.task, TASKS)
        return args.task
    config = run_config(args.run_folder)
    if config is not None:
        return config.task
    path = chosen_path(args.run_folder, place="RUN")
    _refuse_other_forms(path, args.run_folder)
    if (told := task_of_model(path)) is not None:
        return told
    own = path / "lorabank.json"
    files = [own] if own.is_file() else sorted(path.glob("*/lorabank.json"))  # an adapter, or a folder of adapters
    return _task_said(files[0]) if files else DEFAULT_TASK


def _refuse_other_forms(path: Path, typed: str) -> None:
    """Raise ConfigError for an adapter in a form that doesn't name its base, with the way to one that does."""
    weights = "pytorch_lora_weights.safetensors"
    if path.is_file() and path.suffix == ".safetensors":
        form = "a file of weights"
    elif (path / weights).is_file() and not (path / "adapter_config.json").is_file():
        form = "an adapter in diffusers' form"
    else:
        return
    raise ConfigError(
        f"{typed}: {form}, which doesn't name the base that it belongs to. If it is an adapter: "
        f"lorabank convert {shlex.quote(typed)} FOLDER --to peft --model BASE, and name that FOLDER."
    )


def _task_said(file: Path) -> str:
    """What an adapter's own file says; text generation where it says nothing. Raises AdapterFileError for what isn't JSON."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{file}: can't be read ({error}). Fetch the adapter again, or leave the file out.") from error
    metadata = said.get("metadata") if isinstance(said, dict) else None
    return str(metadata.get("task", DEFAULT_TASK)) if isinstance(metadata, dict) else DEFAULT_TASK


def add_machine(parser: CommandParser) -> None:
    """Where the model runs."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument(
        "--dtype",
        default="auto",
        type=dtype_name,
        choices=("auto", "fp32", "bf16", "fp16", "fp8", "nf4"),
        help="storage of the base (default: %(default)s: fp8 or nf4 if it was trained over that)",
    )


def add_sampling(parser: CommandParser, *, temperature: float, max_new_tokens: int) -> None:
    """How answers are drawn."""
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help="longest answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="X",
        help="0 takes the likeliest token; 1 draws as the model says (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw from the likeliest tokens of this joint share (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=42, metavar="N", help="of the draws (default: %(default)s)")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ConfigError for a temperature or share out of range."""
    if not 0 <= args.temperature <= 10:
        raise ConfigError(f"--temperature: expected a number between 0 and 10, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p: expected a number above 0 and at most 1, got {args.top_p}")


def run_config(source: str) -> TrainConfig | None:
    """The configuration of the run that `source` (its folder, or an adapter's in it) belongs to; None when there is none.

    Raises ConfigError for a name that no folder can have.
    """
    from lorabank.config.parse import load_config

    path = chosen_path(source, place="RUN")
    inside = (path / "adapter_config.json").is_file()  # RUN/formal, or RUN/formal/last
    for folder in (path, *path.resolve().parents[:2]) if inside else (path,):
        if (folder / "config.yaml").is_file():
            return load_config(folder)[0]
    return None


def load(args: argparse.Namespace) -> LoadedRun:
    """Load model and adapters, naming what is loaded on stderr."""
    from lorabank import api

    print(f"loading {args.run_folder} …", file=sys.stderr, flush=True)
    run = api.load_run(args.run_folder, args.adapters, device=args.device, dtype=args.dtype, task=args.task)
    print_notes(run.notes)
    return run


def chosen(wanted: Sequence[str] | None, loaded: Sequence[str]) -> list[str]:
    """Names of the answers' columns: what was asked for, or all adapters and the base."""
    return list(wanted) if wanted else [*(name for name in loaded if name != BASE_NAME), BASE_NAME]
