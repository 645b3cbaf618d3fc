"""`lorabank`: finds the command, runs it, and says what went wrong in one message."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence

from lorabank import __version__
from lorabank.cli import chat, combine, convert, evaluate, export, inspect, merge, predict, preview, push, train
from lorabank.cli.parser import CommandParser, with_dashes
from lorabank.errors import ConfigError, LorabankError, closest

COMMANDS = {
    "train": train,
    "preview": preview,
    "chat": chat,
    "eval": evaluate,
    "predict": predict,
    "merge": merge,
    "combine": combine,
    "convert": convert,
    "export": export,
    "push": push,
    "inspect": inspect,
}
LATER = ("plan", "sweep", "report", "serve")
RAW = ("train", "preview")
"""Commands whose flags are the settings of a run."""

OVERVIEW = """\
lorabank: one frozen base model, many LoRA adapters: trained together in one pass, compared and merged.

  lorabank preview --model MODEL --data chat.jsonl        look at three rows, trained tokens coloured
  lorabank train   --model MODEL --data chat.jsonl        train one adapter
  lorabank train   --model MODEL --adapter formal,data=f.jsonl --adapter terse,data=t.jsonl,rank=64
                                                          train two, jointly
  lorabank chat    out/chat --adapters default,base       talk to them side by side
  lorabank eval    out/chat --data test.jsonl --metrics loss,bleu
  lorabank predict out/chat --data in.jsonl --output answers.jsonl
  lorabank inspect | merge | combine                      look into adapter folders, put them together
  lorabank convert style.safetensors out/style --to peft  between kohya's, diffusers' and PEFT's files
  lorabank export | push                                  for vLLM, llama.cpp, ollama; to a hub

`lorabank COMMAND --help` explains a command, `lorabank train --list-settings` lists every setting.
"""


def build_parser() -> CommandParser:
    """The whole command line."""
    parser = CommandParser(
        prog="lorabank",
        description="One frozen base model, many LoRA adapters: trained together in one pass, compared and merged.",
        epilog=f"Later: {', '.join(LATER)}.\nErrors are one message; --debug adds the traceback.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=CommandParser)
    for name, module in COMMANDS.items():
        module.add_parser(subparsers).set_defaults(run=module.run, name=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 well, 1 a fault of ours, 2 a clear error, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _print_anything()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            return _run(words)
    except LorabankError as error:
        if debug:
            raise
        print(f"lorabank: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorabank: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()
        return 141
    except Exception as error:  # noqa: BLE001  (the outermost frame: told with its traceback)
        import traceback

        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        print(f"lorabank: unexpected {what}\nThis is a fault in lorabank: please report it.", file=sys.stderr)
        return 1


def _print_anything() -> None:
    """Let the terminal escape what its encoding lacks, as it does of errors: a file's name or a mark must not end a command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: object) -> None:
    """A warning as a line; one that isn't for users with where it was raised."""
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


def _run(words: list[str]) -> int:
    if not words:
        print(OVERVIEW, end="")
        return 0
    if words[0] == "--version":
        print(f"lorabank {__version__}")
        return 0
    command = words[0]
    if not command.startswith("-"):
        _check_command(command)
    raw = command in RAW
    parser = build_parser()
    try:
        args, extra = parser.parse_known_args(words if raw else with_dashes(words))
    except SystemExit as end:  # argparse prints help, then leaves
        return int(end.code or 0)
    if extra:
        _subparser(command, parser).refuse(extra)
    if "run" not in args:
        parser.error("expected a command")
    return args.run(args)


def _subparser(command: str, parser: CommandParser) -> CommandParser:
    """The parser of one command alone, for its list of flags."""
    if command not in COMMANDS:
        return parser
    holder = CommandParser(prog="lorabank").add_subparsers(parser_class=CommandParser)
    return COMMANDS[command].add_parser(holder)


def _check_command(command: str) -> None:
    if command in LATER:
        raise ConfigError(f"{command}: this command is not available yet. There are {', '.join(COMMANDS)}.")
    if command not in COMMANDS:
        hint = closest(command, [*COMMANDS, *LATER]) or f". There are {', '.join(COMMANDS)}"
        raise ConfigError(f"{command}: unknown command{hint}")


if __name__ == "__main__":  # `python -m lorabank.cli.main`; `python -m lorabank` is the usual form
    sys.exit(main())
