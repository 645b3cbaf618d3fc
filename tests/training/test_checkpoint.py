"""Which checkpoint a resumed run takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorabank.errors import CheckpointError
from lorabank.training.checkpoint import Checkpoint, find_checkpoint, write_checkpoint


def checkpoints(run: Path) -> Path:
    folder = run / "checkpoints"
    for index in (2, 4):
        write_checkpoint(folder, index, Checkpoint(tensors={"x": torch.ones(1)}, values={}), keep=2)
    return folder


def test_a_name_a_number_and_a_path_find_it(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path / "run")
    for wanted in ("step-2", "2", str(folder / "step-2")):
        assert find_checkpoint(folder, wanted) == folder / "step-2"


def test_another_runs_checkpoint_is_refused_and_untouched(tmp_path: Path) -> None:
    mine, other = checkpoints(tmp_path / "mine"), checkpoints(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another run's folder"):
        find_checkpoint(mine, str(other / "step-2"))
    assert sorted(p.name for p in other.iterdir()) == ["step-2", "step-4"]
