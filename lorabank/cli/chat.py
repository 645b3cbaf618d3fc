"""`lorabank chat`: one prompt, every adapter's answer side by side, streaming."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorabank.cli.loading import BASE_NAME, add_sampling, add_source, check_sampling, chosen, load, run_config, task_of
from lorabank.cli.parser import CommandParser, names
from lorabank.config.tasks import DEFAULT_TASK
from lorabank.errors import AdapterNameError, ConfigError, closest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lorabank.training.loaded import LoadedRun

EXAMPLES = """\
examples:
  lorabank chat out/support --adapters formal,terse,base
  echo 'Where is my parcel?' | lorabank chat out/support

while chatting:
  /adapters a,b   answer with these from now on
  /system TEXT    set the system turn and start afresh
  /reset          forget the conversation
  /exit           leave (Ctrl-D too; Ctrl-C ends an answer)
"""
COMMANDS = ("/exit", "/quit", "/reset", "/adapters", "/system", "/help")
NARROWEST_COLUMN = 24


@dataclass
class Session:
    """The conversation of every adapter; they part with the first answer."""

    run: LoadedRun
    adapters: list[str]
    system: str | None
    args: argparse.Namespace
    histories: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    turns: int = 0

    def reset(self) -> None:
        """Forget every conversation."""
        self.histories = {}

    def history(self, name: str) -> list[dict[str, str]]:
        """The conversation of one adapter, which begins with the system turn."""
        return self.histories.setdefault(name, [{"role": "system", "content": self.system}] if self.system else [])

    def answer(self, prompt: str) -> Generator[list[str], None, None]:
        """The answers as they grow, one text an adapter; remembered at the end, or where the reader stops."""
        from lorabank import api

        self.turns += 1
        jobs = [(name, [*self.history(name), {"role": "user", "content": prompt}]) for name in self.adapters]
        texts = [""] * len(jobs)
        args = self.args
        try:
            for deltas in api.generate_stream(
                self.run, jobs, args.max_new_tokens, args.temperature, args.top_p, args.seed + self.turns
            ):
                texts = [text + (delta or "") for text, delta in zip(texts, deltas, strict=True)]
                yield texts
        finally:
            for (name, messages), text in zip(jobs, texts, strict=True):
                self.histories[name] = [*messages, {"role": "assistant", "content": text}]


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to several adapters side by side",
        description="Ask one question, see every adapter's answer side by side as it is written.",
        epilog=EXAMPLES,
    )
    add_source(parser)
    parser.add_argument("--system", metavar="TEXT", help="system turn (default: the run's)")
    add_sampling(parser, temperature=0.7, max_new_tokens=256)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read prompts until the end of the input."""
    check_sampling(args)
    if (task := task_of(args)) != DEFAULT_TASK:
        raise ConfigError(
            f"chat: talks to models of {DEFAULT_TASK}, and this is {task}. Use `lorabank predict {args.run_folder}`."
        )
    config = run_config(args.run_folder)
    loaded = load(args)
    session = Session(loaded, chosen(args.adapters, loaded.names), args.system or (config.data.system if config else None), args)
    from rich.console import Console

    console = Console(highlight=False)
    columns = console.is_terminal and sys.stdin.isatty()
    if columns:
        console.print(f"{' · '.join(session.adapters)}   [dim]/help lists commands, /exit leaves[/]")
    for line in _lines(console, interactive=sys.stdin.isatty()):
        if line.startswith("/"):
            if command(session, line, console):
                return 0
        elif line:
            (_stream_columns if columns else _print_plain)(session, line, console)
    return 0


def _lines(console: Console, *, interactive: bool) -> Iterator[str]:
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())
    if isinstance(sys.stdin, io.TextIOWrapper):  # what isn't in the terminal's encoding becomes U+FFFD, which tokenizers take
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            yield input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
            return


def command(session: Session, line: str, console: Console) -> bool:
    """Obey one line that begins with a slash; True to leave. A wrong one is told and changes nothing."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit"):
        return True
    if word == "/reset":
        session.reset()
        console.print("the conversation is forgotten", style="dim")
    elif word == "/system":
        session.system = rest or None
        session.reset()
        console.print(f"system turn: {rest or 'none'}; the conversation starts afresh", style="dim", markup=False)
    elif word == "/adapters":
        try:
            session.adapters = check_names(names(rest), session.run.names)
        except AdapterNameError as error:
            console.print(str(error), style="yellow", markup=False)
        console.print(f"answering: {', '.join(session.adapters)}", style="dim")
    elif word == "/help":
        console.print(EXAMPLES[EXAMPLES.index("while") :].rstrip(), markup=False)
    else:
        console.print(f"{word}: unknown command{closest(word, COMMANDS)}. /help lists them.", style="yellow", markup=False)
    return False


def check_names(wanted: Sequence[str], loaded: Sequence[str]) -> list[str]:
    """The names, all of them loaded or the base. Raises AdapterNameError."""
    known = [*loaded, BASE_NAME]
    for name in wanted:
        if name not in known:
            raise AdapterNameError(
                f"adapter {name!r} is not loaded{closest(name, known)}; there are {', '.join(dict.fromkeys(known))}"
            )
    return list(dict.fromkeys(wanted)) or [*dict.fromkeys(known)]


def _stream_columns(session: Session, prompt: str, console: Console) -> None:
    """Columns that grow; where they don't fit beside each other, one below the other."""
    from rich.live import Live

    texts = [""] * len(session.adapters)
    answers = session.answer(prompt)
    try:
        with Live(console=console, refresh_per_second=12, vertical_overflow="crop", transient=True) as live:
            for texts in answers:
                live.update(answer_table(session.adapters, texts, console.width))
    except KeyboardInterrupt:
        answers.close()
        console.print("interrupted", style="dim")
    console.print(answer_table(session.adapters, texts, console.width))  # whole: the live view shows a screen at most


def answer_table(adapters: Sequence[str], texts: Sequence[str], width: int) -> Table:
    """The answers beside each other, or below each other on a narrow terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if width // len(adapters) < NARROWEST_COLUMN:
        table = Table(box=box.SIMPLE, show_header=False, expand=True, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(ratio=1)
        for name, text in zip(adapters, texts, strict=True):
            table.add_row(name, Text(text.strip()))
        return table
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="bold cyan")
    for name in adapters:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip()) for text in texts))
    return table


def _print_plain(session: Session, prompt: str, console: Console) -> None:
    for _ in session.answer(prompt):
        pass  # whole answers: lines of several adapters can't grow at once
    for name in session.adapters:
        print(f"{name}: {session.history(name)[-1]['content'].strip()}", flush=True)
