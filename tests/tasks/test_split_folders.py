"""Folders `train`, `validation`, `test` of recordings and of pictures: rows of one are never trained as another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from lorabank.tasks.diffusion.rows import prepare as draw
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.speech.read import read_utterances
from lorabank.tasks.synthesis.rows import Limits
from lorabank.tasks.synthesis.rows import prepare as say
from tests.tasks.diffusion.tiny import folder_of_pictures
from tests.tasks.speech.tiny import RATE, WINDOW_S, audio_folder, tiny_tokens, tone
from tests.tasks.synthesis.made import tiny_processor

PITCH = {"train": 300.0, "validation": 600.0, "test": 900.0}
COUNTS = {"train": 6, "validation": 3, "test": 2}


def _sounds(folder: Path, part: str) -> None:
    audio_folder(folder, [(f"{i}.wav", tone(0.3, PITCH[part], seed=i), "ae") for i in range(COUNTS[part])])


def _pictures(folder: Path, part: str) -> None:
    folder_of_pictures(folder, COUNTS[part], seed=int(PITCH[part]))


def _heard(data: DataConfig, where: Path) -> Any:
    return prepare_speech(data, SpeechConfig(window=WINDOW_S), tiny_tokens(), RATE, seed=0)


def _said(data: DataConfig, where: Path) -> Any:
    limits = Limits(speaker=4, text=40, reduction=2)
    return say(data, SynthesisConfig(), tiny_processor(where / "spm"), limits, seed=0, train=None, val=None)


def _drawn(data: DataConfig, where: Path) -> Any:
    return draw(data, DiffusionConfig(resolution=32, bucket_step=8, min_side=16), step=8, seed=0, train=None, val=None)


KINDS: dict[str, tuple[Callable[[Path, str], None], Callable[[DataConfig, Path], Any]]] = {
    "automatic-speech-recognition": (_sounds, _heard),
    "text-to-speech": (_sounds, _said),
    "text-to-image": (_pictures, _drawn),
}


@pytest.mark.parametrize("task", KINDS)
def test_each_is_a_split(task: str, tmp_path: Path) -> None:
    make, prepared = KINDS[task]
    for part in COUNTS:
        make(tmp_path / "data" / part, part)
    found = prepared(DataConfig(train=str(tmp_path / "data")), tmp_path)
    assert [len(found.train), len(found.val), len(found.test)] == [COUNTS["train"], COUNTS["validation"], 0]
    assert any("left aside" in line and "--data" in line for line in found.report.lines())
    assert all("/train/" in row.origin for row in found.train)
    scored = prepared(DataConfig(test=str(tmp_path / "data"), val_split=0), tmp_path)
    assert [len(scored.train), len(scored.test)] == [0, COUNTS["test"]]
    one = prepared(DataConfig(train=str(tmp_path / "data" / "train"), val=str(tmp_path / "data"), val_split=0), tmp_path)
    assert [len(one.train), len(one.val)] == [COUNTS["train"], COUNTS["validation"]]


@pytest.mark.parametrize("task", KINDS)
def test_a_folder_of_other_splits_is_refused(task: str, tmp_path: Path) -> None:
    make, prepared = KINDS[task]
    make(tmp_path / "data" / "test", "test")
    with pytest.raises(DataError, match="holds test, and no folder 'train' for train data"):
        prepared(DataConfig(train=str(tmp_path / "data")), tmp_path)


def test_rows_of_its_own_and_other_folders_are_read_whole(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _sounds(tmp_path / "named" / part, part)
        _sounds(tmp_path / "speakers" / f"{part}-ann", part)
    (tmp_path / "named" / "metadata.csv").write_text("file_name,transcription\ntrain/0.wav,ae\ntest/0.wav,ae\n")
    own = _heard(DataConfig(train=str(tmp_path / "named"), val_split=0), tmp_path)
    assert len(own.train) == 2 + COUNTS["train"] + COUNTS["test"]  # every table below, as ever
    assert len(_heard(DataConfig(train=str(tmp_path / "speakers"), val_split=0), tmp_path).train) == 8


def test_all_recordings_of_a_folder_are_transcribed(tmp_path: Path) -> None:
    for part in COUNTS:
        _sounds(tmp_path / part, part)
    assert len(read_utterances(str(tmp_path), SpeechConfig(), role="test", with_text=False)) == sum(COUNTS.values())
