"""What each command does with its arguments. merge, combine and inspect are real; the engine is stood in for."""

from __future__ import annotations

import argparse
import io
import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorabank import AdapterConfig, attach
from lorabank.cli import main
from lorabank.cli.chat import answer_table
from lorabank.cli.loading import task_of
from lorabank.config.parse import dump_yaml
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, TrainConfig
from lorabank.errors import AdapterFileError, DataError, Setting, TargetError
from lorabank.formats.adapter import Adapter


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    config = TrainConfig(
        model="M",
        output=str(folder),
        data=DataConfig(train="t.jsonl", limit=20, prompt="Describe: {mr}", completion="{ref}", system="Be kind."),
        adapters={"formal": AdapterRun(), "terse": AdapterRun()},
        eval=EvalConfig(metrics=["loss", "bleu"], max_new_tokens=33),
    )
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return folder


# train, preview -------------------------------------------------------------------------------------------------------


def test_train_hands_over(api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    assert main(["train", "--model", "M", "--data", "f.jsonl", "--lora_r", "4", "--output", str(out), "--dry-run"]) == 0
    (_, (config, resume, dry_run, listeners)) = api.calls[0]
    assert (config.defaults.rank, resume, dry_run, len(listeners)) == (4, False, True, 1)
    assert "note: --lora_r (PEFT, axolotl): read as defaults.rank = 4" in capsys.readouterr().err
    assert main(["train", "--model", "M", "--data", "f.jsonl", "--output", str(out), "--seed", "130"]) == 130


def test_an_existing_run_is_refused_with_the_line_that_resumes_it(
    api: Any, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--model", "M", "--data", "rows.jsonl", "--output", str(run_folder)]
    assert main(line) == 2
    text = capsys.readouterr().err
    assert f"\n  lorabank train {run_folder} --resume\n" in text
    assert api.calls == []
    assert main([*line, "--resume"]) == 0
    assert main(["train", str(run_folder), "--resume"]) == 0
    assert [call[1][1] for call in api.calls] == [True, True]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert main(["train", "--model", "M", "--data", "f", "--output", str(other)]) == 2
    assert "isn't a run of lorabank" in capsys.readouterr().err


def test_an_output_below_home(
    api: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(run_folder.parent))
    assert main(["train", "--model", "M", "--data", "f.jsonl", f"--output=~/{run_folder.name}"]) == 2
    assert f"\n  lorabank train {run_folder} --resume\n" in capsys.readouterr().err
    assert api.calls == []


@pytest.mark.parametrize("name", ["~nosuchuser/x.jsonl", "a" * 300])
@pytest.mark.parametrize("flag", ["--model", "--data", "--output"])
def test_names_that_no_file_can_have_are_named_by_the_flag(
    flag: str, name: str, api: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", "M", "--data", "f.jsonl", flag, name]) == 2
    assert f"lorabank: {flag}: '{name[:9]}" in capsys.readouterr().err
    assert api.calls == []


def test_training_keeps_freed_memory(api: Any, tmp_path: Path) -> None:
    """Once, before the model is loaded; whoever only looks keeps the process as it is."""
    line = ["--model", "M", "--data", "f.jsonl", "--output", str(tmp_path / "new")]
    for words in (["train", *line, "--dry-run"], ["train", "--help"], ["train", "--list-settings"], ["preview", *line]):
        assert main(words) == 0
    assert main(["train", *line, "--rank", "0"]) == 2
    assert api.kept == []
    api.calls.clear()
    assert main(["train", *line]) == 0
    assert api.kept == [0]


def test_errors_of_a_run_name_the_flag(api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is found out only while a run is set up is named as it was typed, too."""
    api.fails = TargetError("adapters.a.targets: 'q_porj' matches no linear layer; data.val_split: 3")
    line = ["--model", "M", "--adapter", "a,data=f.jsonl,targets=q_porj", "--output", str(tmp_path / "new")]
    for command in ("train", "preview"):
        assert main([command, *line]) == 2
        text = capsys.readouterr().err
        assert "lorabank: --adapter a,targets=q_porj: 'q_porj' matches no linear layer; data.val_split: 3\n" in text
    with pytest.raises(TargetError, match=r"^--adapter a,targets"):
        main(["train", *line, "--debug"])


def test_a_copied_run_is_resumed_where_it_is(api: Any, run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "backup"
    copy.mkdir()
    (copy / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert main(["train", str(copy), "--resume", "step-8"]) == 0
    (_, (config, resume, *_)) = api.calls[0]
    assert (config.output, resume) == (str(copy), "step-8")


def test_preview(api: Any) -> None:
    assert main(["preview", "--model", "M", "--data", "f.jsonl", "--count", "5"]) == 0
    assert main(["preview", "--pictures=look", "--model", "M", "--data", "f.jsonl"]) == 0
    for (_, (config, count, pictures)), expected in zip(api.calls, [(5, "lorabank-preview"), (3, "look")], strict=True):
        assert (config.data.train, count, pictures) == ("f.jsonl", *expected)


def test_list_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-settings"]) == 0
    text = capsys.readouterr().out
    for part in (
        "--rank",
        "--data.max-length",
        "--eval.every",
        "--save.keep",
        "--adapters.NAME.data",
        "Rows of A and columns of B",
    ):
        assert part in text


# eval -----------------------------------------------------------------------------------------------------------------


def test_eval_takes_the_runs_settings(api: Any, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_folder), "--json", str(tmp_path / "s.json")]) == 0
    (_, (model, adapters, data, options)) = api.calls[0]
    assert (model, adapters, data.train) == (str(run_folder), None, "t.jsonl")
    assert options["metrics"] == ["loss", "bleu"]
    assert options["max_new_tokens"] == 33
    out, err = capsys.readouterr()
    assert "2 rows read\n" in err
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert ["base", "3.200", "4.0"] in lines
    assert ["formal", "1.100", "30.0"] in lines
    assert json.loads((tmp_path / "s.json").read_text())["formal"]["bleu"] == 30.0


def test_eval_names_missing_rows_by_the_flag_before_anything_is_loaded(
    api: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run_folder), "--data", "nope.jsonl"]) == 2
    assert "--data: no file or folder 'nope.jsonl'" in capsys.readouterr().err
    assert api.calls == []
    assert main(["predict", str(run_folder), "--data", "nope.jsonl", "--output", str(run_folder / "o.jsonl")]) == 2
    assert "--data: no file or folder 'nope.jsonl'" in capsys.readouterr().err


def test_eval_looks_first_where_the_scores_go(api: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in ((run_folder / "no" / "x.json", "there is no folder"), (run_folder, "expected a file, got a folder")):
        assert main(["eval", str(run_folder), "--json", str(name)]) == 2
        assert f"lorabank: --json {name}: {message}" in capsys.readouterr().err
    assert api.calls == []


@pytest.mark.parametrize("command", ["eval", "predict", "chat"])
def test_a_run_that_no_folder_can_be_called(command: str, api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"predict": ["--data", "f.jsonl", "--output", str(tmp_path / "o.jsonl")]}
    assert main([command, "a" * 300, *flags.get(command, [])]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"lorabank: RUN: '{'a' * 60}…' can't be a path here (")
    assert text.count("\n") == 1
    assert api.calls == []


@pytest.mark.parametrize(
    "words", [["inspect", "{}"], ["merge", "{}", "--output", "new"], ["combine", "{}:0.5", "{}:0.5", "--output", "new"]]
)
def test_adapters_that_no_file_can_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format("a" * 300) for word in words]) == 2
    said = capsys.readouterr().err
    assert "can't be a path here" in said
    assert "fault in lorabank" not in said


def test_eval_on_other_rows(api: Any, run_folder: Path) -> None:
    new = str(run_folder / "new.jsonl")
    Path(new).write_text("{}")
    assert main(["eval", str(run_folder), "--adapters", "formal,base", "--data", new, "--metrics", "chrf"]) == 0
    (_, (_, adapters, data, options)) = api.calls[0]
    assert adapters == ["formal", "base"]
    assert (data.train, data.val, data.test, data.val_split) == (None, None, new, 0)
    assert data.prompt == "Describe: {mr}", "the run's templates stay"
    assert data.limit is None, "the limit was of its training rows"
    assert options["metrics"] == ["chrf"]


def test_eval_has_the_flags_that_its_messages_name(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": NaN}\n{"prompt": "a"}\n')
    words = ["eval", str(adapter_folder), "--data", str(rows), "--device", "cpu", "--adapters", "base"]
    assert main(words) == 2
    assert "Correct or delete them, or set --nan-rows to drop, which leaves them out" in capsys.readouterr().err
    assert main([*words, "--nan-rows", "drop", "--bad-rows", "stop"]) == 2
    assert "or set --bad-rows to drop" in capsys.readouterr().err
    assert main([*words, "--nan-rows", "drop"]) == 0
    told = capsys.readouterr()
    assert "'completion' holds NaN" in told.err and "base" in told.out
    assert main([*words, "--nan-rows", "leave"]) == 2


def test_eval_reads_a_runs_own_rows_as_the_run_did(api: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_folder), "--bad-rows", "drop"]) == 2
    assert "--bad-rows: is for the rows of --data" in capsys.readouterr().err
    assert api.calls == []


# predict --------------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predict_with_the_runs_template(api: Any, run_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "in.csv", tmp_path / "deep" / "out.jsonl"
    data.write_text("mr,id\nname[A],1\nname[B],2\nname[Ü],3\n", encoding="utf-8")
    line = ["predict", str(run_folder), "--data", str(data), "--output", str(out), "--batch-size", "4", "--max_new_tokens", "7"]
    assert main(line) == 0
    rows = rows_of(out)
    assert [row["mr"] for row in rows] == ["name[A]", "name[B]", "name[Ü]"]
    assert rows[2]["terse"] == "terse says Describe: name[Ü]"
    assert list(rows[0]) == ["mr", "id", "formal", "terse", "base"]
    jobs, max_new_tokens, temperature, _, _ = api.calls[1][1]
    assert jobs[0] == ("formal", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Describe: name[A]"}])
    assert (max_new_tokens, temperature) == (7, 0.0)


def test_predict_writes_over_no_column(api: Any, run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in.jsonl").write_text('{"mr": "name[A]"}\n{"mr": "name[B]", "terse": "a reference"}\n')
    line = ["predict", str(run_folder), "--data", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(line) == 2
    assert "in.jsonl:2: has a column 'terse', and what 'terse' says would be written over it" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*line, "--adapters", "formal"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "asked"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}]}\n', "Hi"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "Hi"}]}\n', "Hi"),
        ("a.jsonl", '{"instruction": "Add", "input": "1 2"}\n', "Add\n\n1 2"),
        ("a.jsonl", '{"question": "Why?"}\n', "Why?"),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "no"}]}\n', "Hi"),
        ("a.txt", "Where is it?\n\n", "Where is it?"),
        ("a.json", '[{"text": "One"}]', "One"),
    ],
)
def test_forms_of_prompts(name: str, text: str, asked: str, api: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    assert main(["predict", str(tmp_path), "--adapters", "base", "--data", str(tmp_path / name), "--output", str(out)]) == 0
    assert len(rows_of(out)) == 1
    assert api.calls[1][1][0] == [("base", [{"role": "user", "content": asked}])]


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('{"a": 1}\n', [], "in.jsonl:1: expected a column messages"),
        ('{"a": 1}\n', ["--prompt", "{b}"], "--prompt asks for column 'b'"),
        ('{"a": 1}\n', ["--prompt", "{a"], "--prompt: '{a' is no template"),
        ('{"a": 1}\n', ["--prompt", "Say {}"], "--prompt: 'Say {}': expected plain column names"),
        ('{"a": 1}\n', ["--prompt", "{a:d}"], "--prompt: '{a:d}': expected plain column names"),
        ('{"a": 1}\n', ["--prompt", "{a!z}"], "--prompt: '{a!z}': expected plain column names"),
        ('{"prompt": NaN}\n', [], "in.jsonl:1: column 'prompt' holds NaN. Correct or delete that row"),
        ('{"a": "x"}\n{"a": NaN}\n', ["--prompt", "{a}"], "in.jsonl:2: column 'a' holds NaN"),
        ('{"messages": [{"role": "user", "content": NaN}]}\n', [], "in.jsonl:1: column 'messages' holds NaN"),
        ('{"conversations": [{"from": "gpt", "value": NaN}]}\n', [], "in.jsonl:1: column 'conversations' holds NaN"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', [], "no turn before the answer"),
        ('{"prompt": "x"}\n{oops\n', [], "in.jsonl:2"),
        ("", [], "at least one row"),
    ],
)
def test_bad_rows_name_their_line(
    text: str, flags: list[str], message: str, api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    out = tmp_path / "answers.jsonl"
    assert main(["predict", str(tmp_path), "--data", str(tmp_path / "in.jsonl"), "--output", str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert api.calls == [], "no model is loaded for rows that can't be answered"


@pytest.mark.parametrize("run", ["NOSUCHRUN", "owner/nosuchrun", "./nosuchrun", "no such run"])
def test_a_run_that_is_not_there_is_said_before_the_rows_are_read(
    run: str, api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    (tmp_path / "in.jsonl").write_text('{"a": 1}\n')
    assert main(["predict", run, "--data", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "answers.jsonl")]) == 2
    said = capsys.readouterr().err
    assert (f"model {run!r}: " in said and "no such folder" in said) or "neither a folder" in said
    assert "column" not in said
    assert api.calls == []


def no_hub(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


def test_rows_that_are_not_there_are_called_as_they_were_typed(
    api: Any, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["predict", str(tmp_path), "--output", str(tmp_path / "new.jsonl")], ["eval", str(run_folder)]):
        assert main([*command, "--data", "./gone.jsonl"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("lorabank: --data: no file or folder './gone.jsonl'") and "data.test" not in said
    api.fails = DataError(Setting("data.test"), ": no file 'x'")
    for command in (["eval", str(run_folder), "--data", "owner/rows"], ["eval", str(run_folder)]):
        assert main(command) == 2
    given, own = capsys.readouterr().err.splitlines()
    assert (given, own) == ("lorabank: --data: no file 'x'", "lorabank: data.test: no file 'x'"), "its own are the run's"


def test_predict_overwrites_nothing(api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("mine")
    assert main(["predict", "M", "--data", "x.jsonl", "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    (tmp_path / "x.jsonl").write_text('{"prompt": "Hi"}\n')
    line = ["predict", str(tmp_path), "--data", str(tmp_path / "x.jsonl"), "--output"]
    assert main([*line, str(out / "deep" / "answers.jsonl")]) == 2
    assert f"{str(out)!r} is a file, not a folder" in capsys.readouterr().err
    assert api.calls == [], "no model is loaded for a file that can't be made"


def test_predict_onto_a_full_disk(api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("One\nTwo\n" + "x" * 2000 + "\nFour\n")
    out = tmp_path / "answers.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        words = ["--data", str(tmp_path / "in.txt"), "--output", str(out), "--batch-size", "1", "--adapters", "base"]
        assert main(["predict", str(tmp_path), *words]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{out}: File too large. 2 of 4 rows are complete in it." in capsys.readouterr().err
    assert [row["base"] for row in rows_of(out)] == ["base says One", "base says Two"], "no line is cut"


# chat -----------------------------------------------------------------------------------------------------------------


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *words])


def test_chat_keeps_a_history_for_each_adapter(
    api: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "Hi\nAgain\n/adapters terse,base\nThird\n/reset\nFourth\n/system Be brief.\nFifth\n/exit\nnever\n"
    assert chat(script, monkeypatch, str(run_folder), "--adapters", "formal,terse") == 0
    out = capsys.readouterr().out
    assert "formal: formal says Hi" in out
    assert "never" not in out
    turns = [call[1][0] for call in api.calls if call[0] == "generate_stream"]
    system = {"role": "system", "content": "Be kind."}
    assert turns[1][0] == (
        "formal",
        [
            system,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "formal says Hi"},
            {"role": "user", "content": "Again"},
        ],
    )
    assert [name for name, _ in turns[2]] == ["terse", "base"]
    assert [len(messages) for _, messages in turns[2]] == [6, 2], "terse remembers, base is new"
    assert [len(messages) for _, messages in turns[3]] == [2, 2]
    assert turns[4][0][1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Fifth"}]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_takes_bytes_of_another_encoding(errors: str, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    assert main(["chat", "out/x", "--adapters", "base"]) == 0
    assert api.calls[-1][1][0] == [("base", [{"role": "user", "content": "caf\ufffd"}])]


def test_chat_takes_every_adapter_and_the_base(
    api: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("Hi\n/adapters tersee\n/exitt\n", monkeypatch, "out/x") == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()[:3]] == ["formal", "terse", "base"]
    assert "adapter 'tersee' is not loaded (did you mean 'terse'?)" in out
    assert "/exitt: unknown command (did you mean '/exit'?)" in out


@pytest.mark.parametrize("width", [40, 80, 120])
def test_answers_side_by_side(width: int) -> None:
    paper = Console(width=width, record=True, file=io.StringIO())
    paper.print(answer_table(["formal", "terse", "base"], ["one two three [x] " * 5, "short", "other"], width))
    lines = paper.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "[x]" in "".join(lines)
    together = any("one two" in line and "short" in line for line in lines)
    assert together == (width >= 80)


# merge, combine, inspect: the real thing --------------------------------------------------------------------------------


def test_merge_makes_a_plain_model(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    assert main(["merge", str(adapter_folder), "--output", str(out), "--device", "cpu", "--dtype", "fp32"]) == 0
    text = capsys.readouterr().out
    assert "q_proj" in text
    assert "lost of Δ" in text
    merged, base = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (out, base_folder))
    adapter = Adapter.load(adapter_folder)
    path = "model.layers.1.self_attn.q_proj"
    change = merged.get_parameter(f"{path}.weight") - base.get_parameter(f"{path}.weight")
    assert torch.allclose(change, adapter.layers[path].delta(), atol=1e-6)
    assert AutoTokenizer.from_pretrained(out)("hi")["input_ids"] == AutoTokenizer.from_pretrained(base_folder)("hi")["input_ids"]
    assert main(["merge", str(adapter_folder), "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_merge_by_shard_is_the_same_model(
    dtype: str, base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    out, usual = tmp_path / "merged", tmp_path / "usual"
    common = ["merge", str(adapter_folder), "--device", "cpu", "--dtype", dtype]
    assert main([*common, "--by-shard", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "lost of Δ" in text and f"weights in {'bfloat16' if dtype == 'bf16' else 'float32'}" in text
    assert main([*common, "--output", str(usual)]) == 0
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, usual))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (out / "tokenizer.json").read_bytes() == (base_folder / "tokenizer.json").read_bytes()
    assert main([*common, "--by-shard", "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp8", "nf4"])
def test_merge_does_not_save_a_quantised_folder(
    dtype: str, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter_folder), "--dtype", dtype, "--output", str(tmp_path / "new")]) == 2
    assert f"--dtype {dtype}: a merged folder holds plain weights" in capsys.readouterr().err


@pytest.mark.parametrize("by_shard", [[], ["--by-shard"]])
def test_merge_names_its_flags(
    by_shard: list[str], adapter_folder: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from lorabank.formats.fingerprint import Fingerprint

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        base.get_parameter("lm_head.weight").add_(1)
        base.get_parameter("model.embed_tokens.weight").add_(1)
    other = replace(Adapter.load(adapter_folder), fingerprint=Fingerprint.of(base)).save(tmp_path / "other")
    line = ["merge", str(other), *by_shard, "--device", "cpu", "--dtype", "fp32", "--output", str(tmp_path / "out")]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "or pass --force if you know that it fits" in error and "True" not in error
    assert main([*line, "--force", "--strength", "1e39"]) == 2
    assert "is too large for torch.float32. Merge it with a smaller --strength." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_shows_what_is_beside_a_and_b(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    bank = attach(AutoModelForCausalLM.from_pretrained(base_folder))
    config = AdapterConfig(rank=2, targets=["q"], modules_to_save=["norm"], trainable_token_indices=[3])
    bank.add("a", config)
    replace(bank.adapter("a"), base_model=str(base_folder)).save(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--output", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "biases and tables of rows: 1, lost of their change 0.00%" in said
    assert "taken over in full: model.layers.0.input_layernorm, " in said
    assert " and 2 more" in said


def test_merge_shows_experts_by_the_name_of_their_stack(capsys: pytest.CaptureFixture[str]) -> None:
    from lorabank.cli.merge import print_report
    from lorabank.merging.report import LayerLoss, MergeReport

    loss = LayerLoss(weight=1.0, delta=0.1, lost=0.0)
    paths = [f"model.layers.0.mlp.experts.{name}.{index}" for name in ("gate_up_proj", "down_proj") for index in range(3)]
    print_report(MergeReport(layers=dict.fromkeys(paths, loss), dtypes=("float32",)))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows if row[1:2] == ["3"]] == [["gate_up_proj", "3"], ["down_proj", "3"]]


def test_combine_is_the_weighted_sum(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed"
    assert main(["combine", f"{adapter_folder}:0.7", f"{adapter_folder}:-0.2", "--output", str(out)]) == 0
    assert "4 layers, rank 8" in capsys.readouterr().out
    path = "model.layers.0.self_attn.q_proj"
    one, mixed = Adapter.load(adapter_folder).layers[path].delta(), Adapter.load(out).layers[path].delta()
    assert torch.allclose(mixed, 0.5 * one, atol=1e-6)


def test_combine_to_a_rank_with_weights_by_layer(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, by_colon = tmp_path / "mixed", tmp_path / "again"
    parts, weights = [str(adapter_folder)] * 2, ["layers.0=1,q_proj=-0.5,*=0", "-0.25"]
    options = ["--method", "svd", "--rank", "3"]
    assert main(["combine", *parts, "-w", weights[0], "-w", weights[1], *options, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "svd: 4 layers, ranks in all 4 to 8 before" in text and "‖ΔW − result‖/‖ΔW‖ = " in text
    one, mixed = Adapter.load(adapter_folder), Adapter.load(out)
    for index, weight in enumerate((0.75, -0.75)):
        path = f"model.layers.{index}.self_attn.q_proj"
        U, S, Vt = torch.linalg.svd(weight * one.layers[path].delta())
        best = (U[:, :3] * S[:3]) @ Vt[:3]
        assert torch.allclose(mixed.layers[path].delta(), best, atol=1e-5)
        assert mixed.layers[path].rank == 3
    assert mixed.metadata["combine.rank"] == "3"
    colon = [f"{part}:{weight}" for part, weight in zip(parts, weights, strict=True)]
    assert main(["combine", *colon, *options, "--output", str(by_colon)]) == 0
    assert (by_colon / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}", "{}", "-w", "1"], "-w: expected one for each of 2 adapters, in their order, got 1"),
        (["{}", "-w", "mlp"], "-w: weight 'mlp': 'mlp' is no number"),
        (["{}:one"], ": expected ADAPTER:WEIGHT: weight 'one': 'one' is no number"),
        (["{}:mpl=1,*=0"], "adapter' names 'mpl', which matches no layer"),
        (["{}:1e39"], "adapter' makes its change in layer"),
        (["{}:1", "--rank", "4"], "method 'exact' takes no rank; svd, "),
        (["{}:1", "--method", "tise"], "unknown method 'tise' (did you mean 'ties'?)"),
        (["{}:1", "--method", "svd", "--energy", "2"], "energy should be a share"),
    ],
)
def test_combine_says_what_is_wrong_and_writes_nothing(
    words: list[str], said: str, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["combine", *(word.format(adapter_folder) for word in words), "--output", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_combine_shows_a_bar_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabank.cli import combine

    shown: list[int] = []
    now = iter([0.0, 1.0, 1.9, 2.1, 3.0])
    monkeypatch.setattr(combine.time, "monotonic", lambda: next(now))
    bar = combine._LateBar()
    monkeypatch.setattr(bar, "_bar", lambda activity, done, total: shown.append(done))
    for done in range(4):
        bar("combining", done, 4)
    assert shown == [2, 3]


def test_inspect_an_adapter(adapter_folder: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter_folder)]) == 0
    text = capsys.readouterr().out
    assert f"base{base_folder};nofingerprint" in "".join(text.split())
    assert "LoRA, α/r, rank 4, alpha 32" in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["q_proj"])
    deltas = [layer.delta().norm() for path, layer in Adapter.load(adapter_folder).layers.items() if path.endswith("q_proj")]
    root_mean_square = float(sum(delta**2 for delta in deltas) / 2) ** 0.5
    assert float(row[5]) == pytest.approx(root_mean_square, rel=1e-2)
    assert "2 layers with A or B = 0" in text
    assert "no NaN, no infinity" in text


def test_inspect_looks_at_a_broken_adapter(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    (adapter_folder / "lorabank.json").unlink(missing_ok=True)  # its checksum would name the change first
    assert main(["inspect", str(adapter_folder)]) == 1
    assert "NaN or infinity in 1 layer" in capsys.readouterr().out


def test_inspect_a_run(run_folder: Path, adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorabank.training.metrics_file import MetricsFile
    from tests.training.events_for_tests import play

    adapter_folder.rename(run_folder / "formal")
    (run_folder / "checkpoints" / "step-20").mkdir(parents=True)
    play([MetricsFile(run_folder / "metrics.jsonl")])
    assert main(["inspect", str(run_folder)]) == 0
    text = capsys.readouterr().out
    assert "checkpoints: step-20" in text
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert ["formal", "1.250", "30.1"] in lines
    assert "terse: not written yet" in text


def test_inspect_shows_the_scores_of_the_end(tmp_path: Path) -> None:
    """Generation metrics are computed once, at the end; evaluations while training have the loss alone."""
    from lorabank.cli.inspect import best_scores

    end = {
        "event": "end",
        "adapters": {"a": {"best_metrics": {"loss": 1.0, "bleu": 20.5}}, "b": {"best_metrics": {}}},
        "base_metrics": {"loss": 3.0, "bleu": "nan"},
    }
    evals = [{"event": "eval", "adapter": name, "best": True, "metrics": {"loss": 1.1}} for name in ("base", "a", "b")]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (*evals, end)))
    found = best_scores(file)
    assert found["a"] == {"loss": 1.0, "bleu": 20.5}
    assert found["b"] == {"loss": 1.1}
    assert found["base"]["loss"] == 3.0
    assert math.isnan(found["base"]["bleu"])


def test_the_task_of_a_folder_of_adapters_is_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    said = tmp_path / "one" / "lorabank.json"
    said.write_text(json.dumps({"metadata": {"task": "text-classification"}}))
    named = argparse.Namespace(task=None, run_folder=str(tmp_path))
    assert task_of(named) == "text-classification"
    assert task_of(argparse.Namespace(task=None, run_folder=str(tmp_path / "one"))) == "text-classification"
    said.write_text("{")
    with pytest.raises(AdapterFileError, match=r"lorabank\.json: can't be read"):
        task_of(named)


def test_predict_without_rows_says_what_the_source_is_taken_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "nothing-here", "--prompt", "x", "--output", str(tmp_path / "x.png")]) != 0
    assert "nothing-here is taken for text-generation: --task says otherwise" in capsys.readouterr().err
