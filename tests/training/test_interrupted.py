"""Law 6: a run that is killed or interrupted at any moment and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.children import start_command, train_in_child
from tests.training.tiny import assert_same_run, lines_without_clock, write_rows


def settings_of(base: Path, rows: Path, odd: Path) -> dict[str, Any]:
    """Three adapters that differ in all that a checkpoint must hold."""
    return {
        "model": str(base),
        "data": {"train": str(rows), "val_split": 6},
        "output": "out",
        "batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 14,
        "adapters": {
            "formal": {"rank": 4, "dropout": 0.2, "targets": ["all-linear", "all-embedding"]},
            "terse": {"rank": 8, "use_dora": True, "loraplus_ratio": 16, "gradient_accumulation": 3, "batch_size": 2}
            | {"max_steps": 5, "trainable_token_indices": [40, 34]},
            "hasty": {"rank": 2, "early_stopping": 1, "optimizer": "lion", "val_data": str(odd), "learning_rate": 0.02}
            | {"modules_to_save": ["lm_head", "norm"]},
        },
        "eval": {"every": 5, "metrics": ["loss", "exact_match"], "samples": 2, "max_new_tokens": 4},
        "save": {"every": 4, "keep": 2},
        "threads": 1,
        "seed": 1,
    }


@pytest.fixture(scope="module")
def settings(base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    unlike = [{"prompt": "??", "completion": "".join(chr(65 + (7 * i + j) % 26) for j in range(9))} for i in range(4)]
    odd = write_rows(tmp_path_factory.mktemp("odd") / "odd.jsonl", unlike)  # training can only make these less likely
    return settings_of(base_folder, rows_file, odd)


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in_child(folder, settings) == 0
    return folder / "out"


def test_the_reference_run_has_what_the_law_is_about(whole: Path) -> None:
    lines = lines_without_clock(whole / "metrics.jsonl")
    end = lines[-1]
    assert {name: item["status"] for name, item in end["adapters"].items()} == {
        "formal": "finished",
        "terse": "finished",
        "hasty": "stopped early",
    }
    assert end["adapters"]["hasty"]["best_step"] < end["adapters"]["hasty"]["steps"], "its best is not its last"
    assert (whole / "hasty" / "adapter_model.safetensors").read_bytes() != (
        whole / "hasty" / "last" / "adapter_model.safetensors"
    ).read_bytes()
    state = json.loads((whole / "checkpoints" / "step-12" / "state.json").read_text())
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-12", "step-15"]
    assert state["progress"]["adapters"]["formal"]["step"] == 12


KILLS = [
    ("step", 7),  # a pass in which `terse` has gradients waiting: the checkpoint of pass 4 had, too
    ("eval", 3),  # when an evaluation was written and no checkpoint yet
    ("fsync", 10),  # inside the second checkpoint's files
    ("save_adapter", 2),  # when some adapters are saved
]
MORE_KILLS = [
    ("scoring", 1),  # the base, before the first step
    ("step", 3),  # before the first checkpoint: the run starts again
    ("scoring", 6),  # an evaluation, after the checkpoint of pass 4
    ("fsync", 7),  # inside the first checkpoint's files
    ("replace", 5),  # between the renames of a checkpoint
    ("replace", 8),
    ("generating answers", 2),  # final scores
    ("write_card", 2),
]


@pytest.mark.parametrize("moment", [*KILLS, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_KILLS)], ids=str)
def test_killed_and_resumed(moment: tuple[str, int], settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    assert train_in_child(tmp_path, settings, moment=moment) == -signal.SIGKILL
    assert train_in_child(tmp_path, settings, resume=True) == 0
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.slow
def test_killed_again_and_again(settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Each life ends in another place; a kill while a checkpoint is replaced leaves the old one."""
    moments = [("fsync", 1), ("step", 5), ("scoring", 1), ("replace", 2), ("fsync", 2), ("step", 13), ("samples", 1)]
    for moment in moments:
        resume = (tmp_path / "out" / "config.yaml").exists()
        assert train_in_child(tmp_path, settings, moment=moment, resume=resume) == -signal.SIGKILL
    assert train_in_child(tmp_path, settings, resume=True) == 0
    assert_same_run(tmp_path / "out", whole)
    assert train_in_child(tmp_path, settings, resume=True) == 0, "a run that has ended may be resumed"
    assert_same_run(tmp_path / "out", whole)


STOPS = [("step", 7), ("scoring", 4), ("generating answers", 1)]
MORE_STOPS = [("scoring", 1), ("step", 2), ("samples", 1)]


@pytest.mark.parametrize("moment", [*STOPS, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_STOPS)], ids=str)
def test_interrupted_and_resumed(moment: tuple[str, int], settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Ctrl-C: it ends by itself, with a checkpoint of that very moment."""
    assert train_in_child(tmp_path, settings, moment=moment, number=signal.SIGINT) == 130
    end = lines_without_clock(tmp_path / "out" / "metrics.jsonl")[-1]
    assert end["event"] == "end"
    assert end["interrupted"] is True
    assert end["resume_command"] == "lorabank train out --resume"
    newest = max((tmp_path / "out" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    if moment[0] == "step":
        assert newest.name == f"step-{moment[1]}"
    assert train_in_child(tmp_path, settings, resume=True) == 0
    assert_same_run(tmp_path / "out", whole)


def test_ctrl_c_of_the_command(settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Exit code 130, the line that goes on is printed, and it works."""
    (tmp_path / "run.yaml").write_bytes((whole / "config.yaml").read_bytes())
    process = start_command(tmp_path, ["train", "run.yaml"])
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(3000):
        if metrics.is_file() and b'"step"' in metrics.read_bytes():
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert "lorabank train out --resume" in (tmp_path / "log.txt").read_text()
    process = start_command(tmp_path, ["train", "out", "--resume"])
    process.join(60)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "out", whole)
