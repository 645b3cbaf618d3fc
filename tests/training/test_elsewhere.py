"""A run from relative paths goes on from another working folder: its own folder names its files in full."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorabank as lb
from lorabank.config.parse import load_config
from lorabank.errors import CheckpointError
from lorabank.training.run import check_same
from tests.training.children import start_command, train_in_child
from tests.training.tiny import files_of, tiny_model, tiny_rows, tiny_tokenizer, write_rows

FLAGS = "--max-steps 6 --batch-size 4 --learning-rate 5e-3 --samples 0 --save.every 4 --threads 1".split()


def settings_of(folder: Path) -> dict[str, Any]:
    """A TrainConfig with nothing but relative paths; what they name is in `folder`."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", tiny_rows())
    config = lb.TrainConfig(
        model="base",
        output="out",
        data=lb.DataConfig(train="rows.jsonl"),
        defaults=lb.AdapterRun(max_steps=6, batch_size=4, learning_rate=5e-3),
        eval=lb.EvalConfig(samples=0),
        save=lb.SaveConfig(every=4),
        threads=1,
    )
    return {"config": config}


def command(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of `lorabank train WORDS…`, run in `folder`."""
    folder.mkdir(exist_ok=True)
    process = start_command(folder, ["train", *words])
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode, (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in_child(folder, settings_of(folder)) == 0
    return weights(folder)


def weights(folder: Path) -> bytes:
    return (folder / "out" / "default" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("killed_at", [2, 5], ids=["before the first checkpoint", "after it"])
def test_a_run_of_python_goes_on_from_elsewhere(killed_at: int, tmp_path: Path, whole: bytes) -> None:
    assert train_in_child(tmp_path, settings_of(tmp_path), moment=("step", killed_at)) == -signal.SIGKILL
    assert (tmp_path / "out" / "checkpoints").exists() == (killed_at > 4)
    config, _ = load_config(tmp_path / "out")
    assert (config.model, config.data.train) == (str(tmp_path / "base"), str(tmp_path / "rows.jsonl"))
    code, log = command(tmp_path / "elsewhere", "../out", "--resume")
    assert code == 0, log
    assert weights(tmp_path) == whole


def test_flags_before_the_first_checkpoint(tmp_path: Path, whole: bytes) -> None:
    """The same files by other names go on; other settings are refused with both values, and nothing is changed."""
    assert train_in_child(tmp_path, settings_of(tmp_path), moment=("step", 2)) == -signal.SIGKILL
    write_rows(tmp_path / "others.jsonl", tiny_rows(20, "other"))
    before = files_of(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    for words, said in (
        (["--rank", "8"], "--rank: was 16, is 8"),
        (["--seed", "7"], "--seed: was 42, is 7"),
        (["--data", "../others.jsonl"], f"--data: was '{tmp_path / 'rows.jsonl'}', is '{tmp_path / 'others.jsonl'}'"),
    ):
        code, log = command(elsewhere, "../out", "--resume", *words)
        assert code == 2, log
        assert f"lorabank: ../out: the run there has other settings: {said}. Nothing was changed." in log
        assert files_of(tmp_path / "out") == before
    code, log = command(elsewhere, "../out", "--resume", "--data", "../rows.jsonl", "--model", "../base", "--no-compile")
    assert code == 0, log
    assert weights(tmp_path) == whole


def test_a_line_of_flags_again_with_resume(tmp_path: Path, whole: bytes) -> None:
    assert train_in_child(tmp_path, settings_of(tmp_path), moment=("step", 2)) == -signal.SIGKILL
    line = ["--model", "../base", "--data", "../rows.jsonl", "--output", "../out", *FLAGS]
    code, log = command(tmp_path / "elsewhere", *line, "--resume")
    assert code == 0, log
    assert weights(tmp_path) == whole


def test_a_folder_that_names_its_files_relatively(tmp_path: Path, whole: bytes) -> None:
    """As someone may write it, and as earlier versions did: it goes on where those names are right."""
    assert train_in_child(tmp_path, settings_of(tmp_path), moment=("step", 2)) == -signal.SIGKILL
    file = tmp_path / "out" / "config.yaml"
    file.write_text(file.read_text().replace(f"{tmp_path}/", ""))
    assert load_config(file)[0].data.train == "rows.jsonl"
    code, log = command(tmp_path, "out", "--resume")
    assert code == 0, log
    assert weights(tmp_path) == whole


def test_its_configuration_names_files_in_full(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a value, a file or keywords alike; what isn't here stays as it was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base_folder)
    for name in ("a", "b", "val"):
        write_rows(tmp_path / f"{name}.jsonl", tiny_rows(12, name))
    settings: dict[str, Any] = {
        "max_steps": 1,
        "eval": {"samples": 0},
        "learning_rate": 5e-3,
        "model": "base",
        "data": {"val": "./val.jsonl"},
        "adapters": {"a": {"data": "a.jsonl"}, "b": {"data": "b.jsonl", "val_data": "val.jsonl"}},
    }
    Path("run.yaml").write_text(yaml.safe_dump({**settings, "output": "of_file"}))
    lb.train("run.yaml")
    value, _ = load_config("run.yaml")
    lb.train(replace(value, output="of_value"))
    lb.train(**settings, output="of_keywords")
    for output in ("of_file", "of_value", "of_keywords"):
        config, _ = load_config(tmp_path / output)
        a, b = config.adapters["a"], config.adapters["b"]
        found = (config.model, config.data.val, a.data, b.data, b.val_data)
        assert found == tuple(str(tmp_path / name) for name in ("base", "val.jsonl", "a.jsonl", "b.jsonl", "val.jsonl"))
        assert (a.val_data, config.output) == (None, output)


@pytest.mark.parametrize("name", ["save", "device", "a.samples"])
def test_an_adapter_that_is_called_like_a_free_setting_is_compared(name: str) -> None:
    before = lb.TrainConfig(model="base", output="out", adapters={name: lb.AdapterRun(rank=4)})
    check_same(before, replace(before, threads=3, save=lb.SaveConfig(every=9)))  # free to differ
    with pytest.raises(CheckpointError, match=rf"adapters\.{re.escape(name)}\.rank: was 4, is 8"):
        check_same(before, replace(before, adapters={name: lb.AdapterRun(rank=8)}))
