"""`lorabank train`: one or many adapters, jointly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabank.cli.parser import CommandParser
from lorabank.config.flags import parse_train_arguments
from lorabank.config.paths import with_absolute_paths
from lorabank.config.tasks import DEFAULT_TASK, TASKS
from lorabank.config.typed import named_as_typed
from lorabank.errors import OutputError

EXAMPLES = """\
examples:
  lorabank train --model Qwen/Qwen3-0.6B --data chat.jsonl
  lorabank train run.yaml --max-steps 20 --output out/trial
  lorabank train --model Qwen/Qwen3-0.6B --output out/support \\
      --adapter formal,data=formal.jsonl,rank=16 --adapter terse,data=terse.jsonl,rank=64,targets=q,v,mlp
  lorabank train out/support --resume

Every setting of a configuration file is a flag too, by its dotted name: --data.group-by mr,
--eval.metrics loss,bleu, --adapters.formal.rank 8. `lorabank train --list-settings` lists them with their defaults.
A task's own are in a section of its own: --speech.language german (or --language), --images.image-size 224,
--diffusion.save-format kohya (or --save-format).
Keys of PEFT, axolotl, kohya and transformers (--lora_r, --per_device_train_batch_size, …) are understood.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Help only: the words themselves are read by `parse_train_arguments`."""
    parser = subparsers.add_parser(
        "train",
        help="train one or many adapters in one pass over a frozen base model",
        description="Train one or many LoRA adapters in one pass over a frozen base model.",
        usage="lorabank train [FILE] [--model MODEL] [--data ROWS] [--adapter NAME,key=value,… …] [--setting value …]",
        epilog=EXAMPLES,
        keep_words=True,
    )
    add_run_options(parser)
    run = parser.add_argument_group("this run")
    run.add_argument("--max-steps", metavar="N", help="optimizer steps; wins over epochs")
    run.add_argument("--dry-run", help="load, check and plan everything, train nothing", action="store_true")
    run.add_argument("--resume", metavar="CHECKPOINT", nargs="?", help="go on with the run in the output folder")
    run.add_argument("--init-from", metavar="ADAPTER", help="start from the weights of an adapter folder")
    run.add_argument("--report-to", metavar="NAMES", help="tensorboard, wandb, trackio, mlflow; commas between (default: none)")
    run.add_argument("--list-settings", help="list every setting with its default and meaning", action="store_true")
    return parser


def add_run_options(parser: CommandParser) -> None:
    """What `train` and `preview` share: the most used settings, with their defaults."""
    what = parser.add_argument_group("what")
    what.add_argument("file", nargs="?", metavar="FILE", help="configuration (YAML), or the folder of a run; flags win over it")
    what.add_argument("--task", metavar="NAME", help=f"{', '.join(TASKS)} (default: {DEFAULT_TASK})")
    what.add_argument("--model", metavar="MODEL", help="base model: hub id or folder")
    what.add_argument("--data", metavar="ROWS", help="training rows: .jsonl .json .csv .parquet, a folder, or a datasets id")
    what.add_argument("--val", metavar="ROWS", help="validation rows (default: 5 %% of the training rows, --val-split)")
    what.add_argument("--output", metavar="FOLDER", help="run folder (default: out/ and the name of the data)")
    what.add_argument("--adapter", metavar="NAME,key=value,…", help="an adapter and its own settings; once for each adapter")
    adapter = parser.add_argument_group("adapters (all of them; --adapters.NAME.rank for one)")
    adapter.add_argument("--rank", metavar="N", help="rank of the update (default: 16)")
    adapter.add_argument("--alpha", metavar="X", help="the update is scaled by alpha/rank (default: 32)")
    adapter.add_argument("--targets", metavar="NAMES", help="all-linear, q,v,mlp or module names (default: all-linear)")
    adapter.add_argument(
        "--init", metavar="START", help="uniform, gaussian, orthogonal, pissa, olora, eva, loftq (default: uniform)"
    )
    adapter.add_argument(
        "--modules-to-save", metavar="NAMES", help="trained in full beside the adapter (default: a classifier's head)"
    )
    adapter.add_argument("--bias", metavar="WHICH", help="none, lora_only or all biases of the model are trained (default: none)")
    adapter.add_argument(
        "--trainable-token-indices", metavar="IDS", help="tokens whose rows of the embedding are trained, such as 5,9"
    )
    adapter.add_argument("--learning-rate", metavar="X", help="step size (default: auto, printed with its reason)")
    adapter.add_argument("--batch-size", metavar="N", help="rows of an adapter in a pass (default: 8)")
    adapter.add_argument("--gradient-accumulation", metavar="N", help="passes an optimizer step (default: 1)")
    adapter.add_argument("--epochs", metavar="X", help="times through the rows (default: 2)")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--max-length", metavar="N", help="longest row in tokens; longer ones are cut and counted (default: 1024)")
    rows.add_argument("--prompt", metavar="TEXT", help="template for the prompt from columns, such as 'Describe: {mr}'")
    rows.add_argument("--completion", metavar="TEXT", help="template for the answer, such as '{ref}'")
    rows.add_argument("--train-on", metavar="WHAT", help="assistant, completion or all tokens (default: by the form of the rows)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--base-dtype", metavar="TYPE", help="auto, bf16, fp16, fp32, fp8 or nf4 (default: auto)")
    machine.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: auto)")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    machine.add_argument("--seed", metavar="N", help="of initialisation, order and dropout (default: 42)")


def run(args: argparse.Namespace) -> int:
    """Read the line, refuse an existing folder, train."""
    if not args.arguments:
        print(EXAMPLES, end="")
        return 0
    if "--list-settings" in args.arguments or "--list_settings" in args.arguments:
        from lorabank.cli.settings import print_settings

        return print_settings()
    parsed = parse_train_arguments(args.arguments)
    print_notes(parsed.notes)
    with named_as_typed(parsed.flags):
        output = with_absolute_paths(parsed.config).output
    if not parsed.resume and not parsed.dry_run:
        refuse_existing(output)
    if not parsed.dry_run:
        from lorabank.training.allocation import keep_freed_memory

        keep_freed_memory()
    from lorabank import api
    from lorabank.training.console import ConsoleListener

    console = ConsoleListener()
    try:
        with named_as_typed(parsed.flags):
            result = api.train(parsed.config, resume=parsed.resume, dry_run=parsed.dry_run, listeners=[console])
    finally:
        console.close()  # an error must not leave a live table behind
    if parsed.dry_run:
        print("dry run: everything fits together, nothing was trained")
        return 0
    if result.interrupted:
        return 130
    ends = [adapter.status for adapter in result.adapters.values()]
    return 1 if ends and all(status.startswith("stopped: ") for status in ends) else 0


def print_notes(notes: Sequence[str]) -> None:
    """What was translated or chosen, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def refuse_existing(output: str) -> None:
    """Raise OutputError for a folder that holds something, with the line that resumes it."""
    import shlex

    folder = Path(output)
    if folder.is_file():
        raise OutputError(f"{folder}: expected a folder for the run, got a file. Choose another --output.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / "config.yaml").is_file():
        way = f"To go on with that run:\n  {shlex.join(['lorabank', 'train', str(folder), '--resume'])}"
    else:
        way = "It isn't a run of lorabank"
    raise OutputError(f"{folder}: the output folder exists and isn't empty. {way}\nOr choose another one with --output FOLDER.")
