"""Whole runs on a device that runs out of memory, and over a base in fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lorabank as lb
from lorabank.engine.loss_scale import LossScale
from lorabank.errors import TooLargeError
from lorabank.optim.slots import Slot
from lorabank.training.events import RunResult
from tests.training.test_joint import Recorder
from tests.training.tiny import assert_same_run, delta_weights, tiny_model, tiny_rows

TWO: dict[str, Any] = {"formal": {"rank": 4, "max_steps": 6}, "terse": {"rank": 2, "max_steps": 6, "gradient_accumulation": 2}}


def small_memory(model: LlamaForCausalLM, rows: int) -> LlamaForCausalLM:
    """A model whose device takes so many rows at a time."""

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.layers[1].register_forward_hook(look)
    return model


def half_model() -> LlamaForCausalLM:
    return nn.Module.half(tiny_model())  # pyright: ignore[reportReturnType]


def run(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> tuple[RunResult, Recorder]:
    told = Recorder()
    common = {"batch_size": 4, "learning_rate": 5e-3, "seed": 3, "eval": {"every": 3, "samples": 0}, "adapters": TWO}
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), listeners=[told], **{**common, **settings})
    return result, told


def assert_close(one: RunResult, other: RunResult, *, rtol: float, atol: float) -> None:
    for name, adapter in other.trained.items():
        found = delta_weights(one.trained[name])
        for path, delta in delta_weights(adapter).items():
            torch.testing.assert_close(found[path], delta, rtol=rtol, atol=atol, msg=f"{name} {path}")


def test_out_of_memory_costs_a_notice(tokenizer: PreTrainedTokenizerFast) -> None:
    expected, _ = run(tiny_model(), tokenizer)
    found, told = run(small_memory(tiny_model(), 3), tokenizer)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)
    said = [n.text for n in told.notices if "out of memory" in n.text]
    assert said
    assert "out of memory with 8 rows of up to" in said[0]
    assert "went through in parts" in said[0]
    assert len(said) <= 3  # once for each size that was tried, not once a pass


def test_a_row_that_does_not_fit_ends_the_run_with_the_ways_out(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TooLargeError, match=r"activation_offloading: true.*base_dtype: nf4.*data\.max_length"):
        run(small_memory(tiny_model(), 0), tokenizer)


def test_what_was_trained_until_then_is_saved(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """And goes on from there with another way to keep activations: nothing is lost, nothing counted twice."""
    common: dict[str, Any] = {
        "model": str(base_folder),
        "data": {"train": str(rows_file)},
        "adapters": TWO,
        "defaults": {"batch_size": 4, "learning_rate": 5e-3},
        "save": {"every": 0},
        "eval": {"every": 0, "samples": 0},
        "device": "cpu",
    }
    expected = lb.train(**common, output=str(tmp_path / "whole"))
    told = TooLong(3)
    with pytest.raises(TooLargeError):
        lb.train(**common, output=str(tmp_path / "out"), listeners=[told])
    told.hook.remove()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-3"]
    resumed = lb.train(**common, activation_offloading=True, output=str(tmp_path / "out"), resume=True)
    assert_close(resumed, expected, rtol=1e-4, atol=1e-6)


class TooLong(Recorder):
    """The pass after so many doesn't fit, not even a row of it."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes
        self.hook: Any = None

    def on_step(self, record: Any) -> None:
        super().on_step(record)
        if record.pass_index == self.passes and self.hook is None:

            def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

            self.hook = nn.modules.module.register_module_forward_hook(look)


def test_a_validation_that_does_not_fit_keeps_what_was_trained(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "model": str(base_folder), "data": {"train": str(rows_file)}, "adapters": TWO, "defaults": {"batch_size": 4},
        "eval": {"every": 3, "samples": 0}, "save": {"every": 0}, "device": "cpu", "output": str(tmp_path / "out"),
    }  # fmt: skip
    told = TooLong(3)
    with pytest.raises(TooLargeError, match="a stopped run can be resumed"):
        try:
            lb.train(**common, listeners=[told])
        finally:
            told.hook.remove()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-3"]
    assert lb.train(**common, resume=True).adapters["formal"].steps == 6


def test_no_room_for_the_optimizer_is_told_before_any_pass(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.00 GiB.")

    monkeypatch.setattr(Slot, "ready_state", none_left)
    told = Recorder()
    with pytest.raises(
        TooLargeError, match=r"optimizer's state of 2 adapters \(CUDA out of memory.*17.00 GiB.\).*base_dtype: nf4"
    ):
        lb.train(model=tiny_model(), tokenizer=tokenizer, data=tiny_rows(), adapters=TWO, listeners=[told])
    assert not told.steps


def test_fp16_ends_where_fp32_does(tokenizer: PreTrainedTokenizerFast) -> None:
    full, _ = run(tiny_model(), tokenizer)
    half, told = run(half_model(), tokenizer, base_dtype="fp16")
    for name in TWO:
        assert half.adapters[name].final_metrics["loss"] == pytest.approx(full.adapters[name].final_metrics["loss"], rel=2e-2)
    assert not [n for n in told.notices if "overflowed" in n.text]


def test_a_joint_run_in_fp16_is_each_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    together, _ = run(half_model(), tokenizer)
    for name, settings in TWO.items():
        alone, _ = run(half_model(), tokenizer, adapters={name: settings})
        loss = together.adapters[name].final_metrics["loss"]
        assert loss == pytest.approx(alone.adapters[name].final_metrics["loss"], rel=2e-3)


def test_a_step_that_overflows_is_skipped_and_said_once(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**22, 0))
    result, told = run(half_model(), tokenizer)
    said = [n for n in told.notices if "overflowed fp16" in n.text]
    assert sorted(str(n.adapter) for n in said) == ["formal", "terse"]
    assert all(adapter.steps == 6 for adapter in result.adapters.values())  # skipped ones don't count
    assert {record.step for record in told.steps if record.adapter == "formal"} == set(range(1, 7))


def test_resumed_in_fp16(base_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6 with the scales: an interrupted run ends with the bytes of one that was not."""
    monkeypatch.setattr("lorabank.engine.loss_scale.GOOD_PASSES", 3)  # so that they move
    common: dict[str, Any] = {
        "model": str(base_folder),
        "base_dtype": "fp16",
        "data": {"train": str(rows_file)},
        "adapters": TWO,
        "defaults": {"batch_size": 4, "learning_rate": 5e-3},
        "save": {"every": 2},
        "eval": {"every": 3, "samples": 0},
        "device": "cpu",
        "output": "out",
    }
    for place in ("whole", "broken"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        if place == "broken":
            Stop(4).run(common)
        lb.train(**common, resume=place == "broken")
    assert_same_run(tmp_path / "whole" / "out", tmp_path / "broken" / "out")


class Stop(Recorder):
    """Interrupts a run after some passes, as Ctrl-C would."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    def run(self, settings: dict[str, Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            lb.train(**settings, listeners=[self])

    def on_step(self, record: Any) -> None:
        super().on_step(record)
        if record.pass_index == self.passes:
            raise KeyboardInterrupt


def test_offloaded_inputs_change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    expected, _ = run(tiny_model(), tokenizer, gradient_checkpointing=True)
    found, _ = run(tiny_model(), tokenizer, activation_offloading=True)
    assert_close(found, expected, rtol=0, atol=0)
