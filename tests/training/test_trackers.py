"""Trackers: scalars under one name scheme, through the real library where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from lorabank.config.parse import to_dict
from lorabank.config.train import TrainConfig
from lorabank.errors import ConfigError, MissingExtraError
from lorabank.training.trackers import TRACKERS, Tracker, make_trackers
from tests.training.events_for_tests import play, result


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float] | str]] = []
        self.ended: bool | None = None

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None:
        self.lines.append((pass_index, dict(values)))

    def text(self, text: str, pass_index: int) -> None:
        self.lines.append((pass_index, text))

    def end(self, interrupted: bool) -> None:
        self.ended = interrupted


def test_names_and_axes(tmp_path: Path) -> None:
    sink = Recorder()
    tracker = Tracker(sink)
    play([tracker])
    tracker.on_end(result(tmp_path))
    assert sink.lines[0] == (0, {"eval/loss/base": 3.21, "eval/bleu/base": 4.2})
    assert sink.lines[1][0] == 1
    assert "train/loss/formal" in sink.lines[1][1]
    assert (15, "formal: validation loss is rising") in sink.lines
    assert sink.ended is False


def test_tensorboard_writes_what_it_was_given(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra that the pinned test environment has")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listeners = make_trackers(["tensorboard"], tmp_path, to_dict(TrainConfig(model="m")))
    play(listeners)
    listeners[0].on_end(result(tmp_path / "out"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss/formal")
    assert [item.step for item in losses] == list(range(1, 21))
    assert losses[0].value == pytest.approx(1 + 2 * 0.8187308, rel=1e-5)
    assert [item.value for item in events.Scalars("eval/loss/formal")] == pytest.approx([1.25, 1.31])


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_library_is_named_with_its_pip_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)  # as if it weren't installed
    with pytest.raises(MissingExtraError, match=f"pip install {name}"):
        make_trackers([name], tmp_path, {})


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        make_trackers(["wandbb"], "out", {})
    assert make_trackers([], "out", {}) == []


def test_a_server_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    class Gone(Recorder):
        def text(self, text: str, pass_index: int) -> None:
            raise ConnectionError("gone")

    tracker = Tracker(Gone(), "wandb")
    with pytest.warns(UserWarning, match="wandb: ConnectionError.* metrics.jsonl has everything") as caught:
        play([tracker])
        tracker.on_end(result(tmp_path))
    assert len(caught) == 1
    assert tracker.failed
