"""Packing in training: which rows share one, and laws 3 and 6 for whole runs."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import lorabank as lb
from lorabank.data.render import TokenRow
from lorabank.errors import CheckpointError, ConfigError
from lorabank.training.packing import pack_rows
from lorabank.training.streams import RowStream
from tests.training.children import train_in_child
from tests.training.test_joint import Recorder, assert_same_adapter, assert_same_records, run
from tests.training.tiny import assert_same_run, tiny_model, tiny_rows, write_rows


def rows_of(count: int, seed: int = 0, longest: int = 40) -> list[TokenRow]:
    """Rows of 1 to `longest` tokens."""
    draw = random.Random(seed)
    return [_row(draw.randint(1, longest)) for _ in range(count)]


def _row(length: int) -> TokenRow:
    ids = tuple(range(length))
    return TokenRow(
        input_ids=ids,
        weights=(1.0,) * length,
        prompt_ids=(),
        prompt_text="",
        reference="",
        origin="",
        group=None,
        truncated=False,
    )


def test_examples_fill_rows_and_none_is_lost() -> None:
    draw = random.Random(3)
    for _ in range(50):
        lengths = [draw.randint(1, 30) for _ in range(draw.randint(1, 60))]
        packed = pack_rows(lengths, 30)
        assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 30 for row in packed)
        fewest = -(-sum(lengths) // 30)
        assert len(packed) <= max(fewest + 1, 11 * fewest / 9 + 1)
    assert pack_rows([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack_rows([4, 10, 6, 3, 7], 10) == [[1], [4, 3], [2, 0]]
    assert pack_rows([50, 1], 10) == [[0], [1]], "longer than a row may be: in one of its own"
    assert pack_rows([], 10) == []


def test_an_epoch_has_every_row_once() -> None:
    stream = RowStream(rows_of(500), 3, seed=5, pack_to=64)
    position = 0
    for epoch in range(3):
        seen: list[int] = []
        while len(seen) < 500:
            packed = stream.packed(position)
            assert 1 <= len(packed) <= 3
            assert all(sum(len(stream.rows[i].input_ids) for i in row) <= 64 for row in packed)
            assert stream.batch(position) == [i for row in packed for i in row]
            assert len(stream.batch(position)) <= stream.most_examples
            assert epoch <= stream.passes(position) < epoch + 1
            seen += stream.batch(position)
            position += 1
        assert sorted(seen) == list(range(500))
        assert stream.passes(position) == epoch + 1
        assert stream.micro_batches(epoch + 1) == position
    assert stream.micro_batches(2) < stream.micro_batches(2.5) < stream.micro_batches(3)


def test_the_order_is_a_function_of_seed_rows_batch_size_and_length() -> None:
    rows = rows_of(200)
    far = RowStream(rows, 2, seed=5, pack_to=64).packed(90)
    stream = RowStream(rows, 2, seed=5, pack_to=64)
    assert [stream.packed(i) for i in range(91)][90] == far
    first = stream.packed(0)
    others = [
        RowStream(rows, 2, seed=6, pack_to=64),
        RowStream(rows, 2, seed=5, pack_to=48),
        RowStream(rows_of(200, seed=1), 2, seed=5, pack_to=64),
    ]
    assert all(other.packed(0) != first for other in others)
    again = stream.micro_batches(1)
    assert [stream.packed(i) for i in range(again)] != [stream.packed(again + i) for i in range(again)], "another mix each epoch"
    count, share = stream.packed_rows()
    assert count == sum(len(stream.packed(i)) for i in range(again))
    assert share == pytest.approx(sum(len(row.input_ids) for row in rows) / (64 * count))
    assert share > 0.97


def test_without_packing_a_row_is_an_example() -> None:
    stream = RowStream(rows_of(50), 4, seed=2)
    assert stream.micro_batches(1) == 13
    assert stream.micro_batches(2.5) == 33
    assert stream.passes(20) == pytest.approx(20 / 13)
    assert all(len(row) == 1 for row in stream.packed(3))
    assert stream.most_examples == 4


PACKED: dict[str, Any] = {"packing": True, "max_length": 160}


def test_law3_together_as_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", tiny_rows(24, "thing"))
    adapters: dict[str, Any] = {
        "formal": {"rank": 4, "dropout": 0.2, "max_steps": 9, "batch_size": 2},
        "terse": {"rank": 16, "loraplus_ratio": 8, "gradient_accumulation": 3, "batch_size": 1, "max_steps": 3},
        "other": {"rank": 2, "data": str(own), "epochs": 2, "batch_size": 3, "learning_rate": 0.05, "optimizer": "sgd"},
    }
    together, told = run(tokenizer, adapters, **PACKED)
    for name, settings in adapters.items():
        alone, only = run(tokenizer, {name: settings}, **PACKED)
        assert_same_records(name, told, only)
        assert_same_adapter(name, together, alone)
        assert together.adapters[name].best_step == alone.adapters[name].best_step
    assert together.adapters["other"].steps < 16, "24 rows twice, three a batch, packed"


def test_it_trains_as_without_where_all_rows_are_in_every_step(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"rank": 4, "max_steps": 6}
    rows = tiny_rows(12)
    plain, told = run(tokenizer, {"a": {**settings, "batch_size": 12}}, data=rows, val_split=0)
    packed, also = run(tokenizer, {"a": {**settings, "batch_size": 12}}, data=rows, val_split=0, **PACKED)
    assert_same_adapter("a", plain, packed)
    assert [r.loss for r in also.steps] == pytest.approx([r.loss for r in told.steps], rel=1e-3)
    assert [r.tokens for r in also.steps] == [r.tokens for r in told.steps]


def test_every_row_gets_its_loss_and_the_table_says_how_full(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = Recorder()
    settings: dict[str, Any] = {"batch_size": 2, "epochs": 1, "learning_rate": 1e-3, "seed": 3, "val_split": 4, **PACKED}
    lb.train(
        model=tiny_model(),
        tokenizer=tokenizer,
        data=tiny_rows(),
        adapters={"a": {}},
        output=str(out),
        listeners=[told],
        **settings,
    )
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    (plan,) = start["adapters"]
    rows, share = plan["packed_rows"]
    assert plan["train_rows"] == 36
    assert rows < 36 / 2
    assert 0.5 < share <= 1
    assert plan["total_steps"] == -(-rows // 2) == len(told.steps)
    state = json.loads(next((out / "checkpoints").glob("*/state.json")).read_text())
    assert len(state["progress"]["adapters"]["a"]["row_losses"]) == 36
    assert told.steps[-1].epoch == 1


@pytest.fixture(scope="module")
def settings(base_folder: Path, rows_file: Path) -> dict[str, Any]:
    return {
        "model": str(base_folder),
        "data": {"train": str(rows_file), "val_split": 6, **PACKED},
        "output": "out",
        "learning_rate": 5e-3,
        "adapters": {
            "a": {"rank": 4, "dropout": 0.2, "batch_size": 1, "gradient_accumulation": 3, "max_steps": 8},
            "b": {"rank": 2, "batch_size": 2, "epochs": 3},
        },
        "eval": {"every": 5, "samples": 0},
        "save": {"every": 4, "keep": 2},
        "threads": 1,
    }


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in_child(folder, settings) == 0
    return folder / "out"


@pytest.mark.parametrize("step", [3, 9, 14])
def test_law6_killed_and_resumed(step: int, settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle of an accumulation, and in a later pass over the rows."""
    assert train_in_child(tmp_path, settings, moment=("step", step)) == -signal.SIGKILL
    assert train_in_child(tmp_path, settings, resume=True) == 0
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("change", [{"packing": False}, {"max_length": 159}])
def test_rows_packed_otherwise_are_another_run(
    change: dict[str, Any], settings: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    other = {**settings, "data": {**settings["data"], **change}}
    with pytest.raises(CheckpointError, match=rf"data\.{next(iter(change))}: was"):
        lb.train(**{**other, "resume": True})


def test_a_model_that_cannot_is_refused_before_the_first_step(tokenizer: PreTrainedTokenizerFast) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4))
    told = Recorder()
    with pytest.raises(ConfigError, match=r"data\.packing: BloomForCausalLM can't take packed rows"):
        lb.train(
            model=model,
            tokenizer=tokenizer,
            data=tiny_rows(),
            adapters={"a": {"learning_rate": 1e-3}},
            listeners=[told],
            **PACKED,
        )
    assert not told.steps
