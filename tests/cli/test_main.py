"""The command line's frame: help, speed, misspelt words, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lorabank
from lorabank.cli import main
from lorabank.cli.main import COMMANDS, LATER
from lorabank.config.tasks import DEFAULT_TASK, TASKS
from lorabank.errors import DataError

HEAVY = "torch transformers datasets rich matplotlib numpy yaml safetensors tokenizers"


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from lorabank.cli import main
for words in [[], ["--help"], ["--version"], *([name, "--help"] for name in {list(COMMANDS)!r})]:
    assert main(words) == 0, words
heavy = [name for name in {HEAVY!r}.split() if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("module", ["lorabank", "lorabank.cli", "lorabank.cli.main"])
def test_every_form_of_the_command_runs(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lorabank: trian: unknown command (did you mean 'train'?)" in done.stderr


def test_every_task_that_needs_an_extra_has_one_of_its_name() -> None:
    import tomllib

    extras = tomllib.loads((Path(lorabank.__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    alone = {DEFAULT_TASK, "text2text-generation"}
    assert {task for task in TASKS if task not in extras} == alone
    for task in set(TASKS) - alone:
        (needed,) = extras[task]
        name = needed.removeprefix("lorabank[").removesuffix("]")
        assert name in extras and f"lorabank[{name}]" == needed


def test_alone_it_gives_an_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("lorabank: one frozen base model")
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_help_says_what_it_does_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"  lorabank {command} " in text
    assert text.startswith(f"usage: lorabank {command} ")


def test_warnings_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warns(words: list[str]) -> int:
        warnings.warn("the base isn't the one", stacklevel=1)
        warnings.warn("an old call", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(sys.modules["lorabank.cli.main"], "_run", warns)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["chat"]) == 0
    assert warnings.showwarning is before
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "warning: the base isn't the one"
    assert "FutureWarning: an old call" in second


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorabank {lorabank.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian: unknown command (did you mean 'train'?)"),
        (["xyzzy"], "xyzzy: unknown command. There are train, preview"),
        (["chat", "out", "--adaptres", "a"], "--adaptres: unknown flag (did you mean '--adapters'?)"),
        (["chat", "out", "--adapt", "a"], "--adapt: unknown flag (did you mean '--adapters'?)"),
        (["chat"], "the following arguments are required: RUN. `lorabank chat --help`"),
        (["chat", "out", "more"], "'more': not expected here"),
        (["chat", "out", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["chat", "out", "--temperature", "-1"], "--temperature: expected a number between 0 and 10"),
        (["chat", "out", "--top-p", "0"], "--top-p: expected a number above 0"),
        (["predict", "out", "--data", "x", "--output", "y", "--max-rows", "0"], "expected a whole number ≥ 1, got '0'"),
        (["--nonsense"], "--nonsense: unknown flag"),
        (["train", "--model", "M", "--data", "f", "--rnak", "8"], "--rnak: unknown flag (did you mean '--rank'?)"),
        (["preview", "--model", "M", "--data", "f", "--count", "x"], "--count: expected a whole number ≥ 1, got 'x'"),
        (["combine", "a", "--output", "x"], "a: expected ADAPTER:WEIGHT"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["eval", "nowhere"], "--data: missing"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("lorabank: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", LATER)
def test_later_commands_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert "not available yet" in capsys.readouterr().err


def failing(error: BaseException) -> object:
    def run(args: object) -> int:
        raise error

    return run


def test_errors_and_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(COMMANDS["inspect"], "run", failing(DataError("x.jsonl:3: broken")))
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "lorabank: x.jsonl:3: broken\n"
    with pytest.raises(DataError):
        main(["inspect", "x", "--debug"])
    monkeypatch.setattr(COMMANDS["inspect"], "run", failing(KeyboardInterrupt()))
    assert main(["inspect", "x"]) == 130
    monkeypatch.setattr(COMMANDS["inspect"], "run", failing(ZeroDivisionError("oh")))
    assert main(["inspect", "x"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "unexpected ZeroDivisionError: oh" in text


def test_a_terminal_that_lacks_a_mark_gets_it_escaped() -> None:
    """`combine --help` has ‖ΔW‖²."""
    call = [sys.executable, "-m", "lorabank", "combine", "--help"]
    told = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert told.returncode == 0 and "\\u2016\\u0394W\\u2016" in told.stdout and not told.stderr
