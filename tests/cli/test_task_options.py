"""Flags of `lorabank predict` that only some tasks take."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lorabank.cli import main, predict
from lorabank.cli.parser import CommandParser
from lorabank.cli.task_options import DETECTION, PICTURES, SEQ2SEQ, SPEECH, TASK_FLAGS, task_options
from lorabank.config.tasks import DEFAULT_TASK, TASKS
from lorabank.errors import ConfigError

WORDS = {
    "timestamps": ["--timestamps"],
    "mix": ["--mix", "a:0.5,b:0.5"],
    "size": ["--size", "768x512"],
    "prompt": ["--prompt", "a hat"],
    "system": ["--system", "Be brief."],
    "language": ["--language", "german"],
    "bad_rows": ["--bad-rows", "stop"],
    "negative": ["--negative", "blur"],
}
"""How a flag is given; the others take 3."""
SAMPLING = {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 42}


def parser() -> CommandParser:
    return predict.add_parser(CommandParser(prog="lorabank").add_subparsers(parser_class=CommandParser))


def parsed(*words: str) -> argparse.Namespace:
    return parser().parse_args(["out/x", "--output", "o", *words])


@pytest.mark.parametrize("name", TASK_FLAGS)
def test_a_flag_is_for_its_tasks(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    args = parsed(*WORDS.get(name, [flag, "3"]))
    assert parser().get_default(name) == TASK_FLAGS[name].usual, "else a flag that nobody gave would be refused"
    for task in TASKS:
        if task in TASK_FLAGS[name].tasks:
            assert task_options(args, task)[name] == getattr(args, name) != TASK_FLAGS[name].usual
        else:
            with pytest.raises(ConfigError) as error:
                task_options(args, task)
            tasks = ", ".join(TASK_FLAGS[name].tasks)
            assert str(error.value) == f"{flag}: is for {tasks}, and this run's task is {task}. Leave it out."


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (DEFAULT_TASK, SAMPLING),
        *((task, {"max_new_tokens": 256}) for task in SEQ2SEQ),
        (PICTURES, {"seed": 42}),
        (SPEECH, {}),
        (DETECTION, {}),
        ("text-classification", {}),
    ],
)
def test_nobody_is_told_what_was_not_given(task: str, told: dict[str, object]) -> None:
    assert task_options(parsed(), task) == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance", "101"], "--guidance: expected a number from 0 to 100, got 101.0"),
        (["--guidance", "nan"], "--guidance: expected a number from 0 to 100, got nan"),
        (["--prompt", "a hat", "--data", "c.txt"], "--prompt: draws one caption, and --data captions of a file"),
    ],
)
def test_pictures_are_told_no_nonsense(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_options(parsed(*words), PICTURES)
    assert message in str(error.value)


@pytest.mark.parametrize("size", ["0x5", "5x", "1x2x3", "wide"])
def test_a_size_is_width_and_height(size: str) -> None:
    assert parsed("--size", "512").size == (512, 512)
    with pytest.raises(ConfigError, match="expected WIDTHxHEIGHT, such as 768x512"):
        parsed("--size", size)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            "image-classification",
            ["eval", "--language", "german"],
            "--language: is for automatic-speech-recognition, and this run's",
        ),
        ("text-generation", ["eval", "--source-lang", "en"], "--source-lang: is for summarization, translation, text2text-gen"),
        ("object-detection", ["predict", "--output", "x.csv"], "object-detection writes JSON, no .csv. Name a folder, or a file"),
        ("image-classification", ["predict", "--output", "x.png"], "expected a name for JSON lines, got .png"),
        ("text-classification", ["predict", "--output", "x.parquet"], "expected a name for JSON lines, got .parquet"),
        ("summarization", ["predict", "--output", "x.csv"], "expected a name for JSON lines, got .csv"),
        ("automatic-speech-recognition", ["predict", "--output", "x.doc"], "expected a name ending in .jsonl, .txt, .srt, .vtt"),
        ("text-to-speech", ["predict", "--output", "x.wav"], "expected a folder, got the name of a .wav file"),
    ],
)
def test_what_is_typed_wrong_is_refused_before_the_model_is_loaded(
    task: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model isn't there, which loading it would say."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"task: {task}\nmodel: {tmp_path}/nowhere\n")
    (tmp_path / "x").mkdir()
    told = [str(tmp_path / "x" / word) if word.startswith("x.") else word for word in words]
    assert main([told[0], str(tmp_path / "run"), "--adapters", "base", "--data", str(rows), *told[1:]]) == 2
    assert message in capsys.readouterr().err
