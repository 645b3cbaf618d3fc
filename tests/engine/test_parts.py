"""Batches that don't fit into memory go through in parts that add up to the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from lorabank import BASE
from lorabank.bank.routing import RowRoute
from lorabank.engine.batch import with_base_references
from lorabank.engine.parts import is_out_of_memory
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.errors import TooLargeError
from tests.engine.tiny import batch_of, gradients, make_bank

LENGTHS = (5, 9, 7, 12, 3, 8)
ROUTES: Sequence[RowRoute] = ["a", "b", BASE, "a", "b", "a"]


@contextmanager
def memory_for(
    engine: Engine, tokens: int, *, in_backward: bool = False, error: RuntimeError | None = None
) -> Iterator[list[tuple[int, ...]]]:
    """A device that runs out of memory above so many padded tokens, in the last block; yields the shapes that were tried."""
    engine.head()  # whose probe isn't counted
    engine.folded()
    tried: list[tuple[int, ...]] = []
    error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")

    def fail(gradient: Tensor) -> Tensor:
        raise error

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        tried.append(tuple(hidden.shape[:2]))
        if hidden.shape[0] * hidden.shape[1] > tokens:
            if not in_backward or not hidden.requires_grad:
                raise error
            args[0].register_hook(fail)  # when the later blocks have their gradients already

    handle = engine.bank.model.get_submodule("model.layers.1").register_forward_hook(look)
    try:
        yield tried
    finally:
        handle.remove()


def found(engine: Engine, **kwargs: Any) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    losses = forward_backward(engine, batch_of(LENGTHS, ROUTES), **kwargs)
    return losses, {name: gradients(engine.bank, name) for name in engine.bank.names}


def assert_same(one: tuple[dict[str, Any], Any], other: tuple[dict[str, Any], Any]) -> None:
    for name, loss in other[0].items():
        assert one[0][name].tokens == loss.tokens
        assert one[0][name].row_losses == pytest.approx(loss.row_losses, rel=1e-5)
    for name, leaves in other[1].items():
        for key, gradient in leaves.items():
            torch.testing.assert_close(one[1][name][key], gradient, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("tokens", [70, 40, 12])
def test_parts_add_up_to_the_whole(tokens: int, in_backward: bool) -> None:
    expected = found(Engine(make_bank(dropout=0.3)), steps={"a": 3, "b": 5})
    engine = Engine(make_bank(dropout=0.3))
    with memory_for(engine, tokens, in_backward=in_backward) as tried:
        assert_same(found(engine, steps={"a": 3, "b": 5}), expected)
    assert tried[0] == (6, 12)
    assert engine.fits.times >= 1


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY (2)",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_memory_that_a_library_did_not_get(said: str) -> None:
    """cuBLAS, cuDNN, Triton and CUDA have errors of their own, none of them a kind that torch knows."""
    expected = found(Engine(make_bank()))
    engine = Engine(make_bank())
    with memory_for(engine, 40, error=RuntimeError(said)):
        assert_same(found(engine), expected)
    assert engine.fits.times >= 1


@pytest.mark.parametrize("way", ["inner", "cause", "context", "none"])
def test_memory_that_a_compiler_did_not_get(way: str) -> None:
    """Backward is compiled when it is first run, with memory full."""
    lacking = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    error: Exception = InductorError(lacking if way == "inner" else RuntimeError("lowering failed"), None)
    error.__cause__ = lacking if way == "cause" else None
    error.__context__ = lacking if way == "context" else error  # a circle is no trap
    assert is_out_of_memory(error) == (way != "none")


def test_other_errors_are_raised_as_they_are() -> None:
    engine = Engine(make_bank())
    with (
        memory_for(engine, 40, error=RuntimeError("CUDA error: an illegal memory access")),
        pytest.raises(RuntimeError, match="illegal"),
    ):
        found(engine)
    assert engine.fits.times == 0


def test_a_pass_that_broke_off_leaves_gradients_as_they_were() -> None:
    plain, engine = Engine(make_bank()), Engine(make_bank())
    for one in (plain, engine):
        forward_backward(one, batch_of((6, 4), ["a", "b"], seed=1))
    expected = found(plain)
    with memory_for(engine, 40, in_backward=True):
        assert_same(found(engine), expected)


def test_what_was_learnt_holds_for_the_next_batch() -> None:
    engine = Engine(make_bank())
    with memory_for(engine, 40) as tried:
        found(engine)
        assert engine.fits.tokens is not None
        assert engine.fits.tokens <= 40
        before, tried[:] = engine.fits.times, []
        found(engine)
        assert engine.fits.times == before
        assert len(tried) > 1
        assert all(rows * length <= engine.fits.tokens for rows, length in tried)


def test_one_row_that_does_not_fit() -> None:
    engine = Engine(make_bank())
    forward_backward(engine, batch_of((6,), "a"))
    before = gradients(engine.bank, "a")
    with (
        memory_for(engine, 11),
        pytest.raises(TooLargeError, match=r"a row of 12 tokens alone .*Tried to allocate 1.00 GiB"),
    ):
        found(engine)
    assert engine.fits.times > 1
    assert_gradients(gradients(engine.bank, "a"), before)


def test_a_later_part_that_does_not_fit_undoes_the_earlier_ones() -> None:
    engine = Engine(make_bank())
    forward_backward(engine, batch_of((6,), "a"))
    before = gradients(engine.bank, "a")
    engine.fits.tokens = 12  # parts of a row or two; the row of 12 comes fourth
    with memory_for(engine, 11) as tried, pytest.raises(TooLargeError):
        found(engine)
    assert len(tried) > 1
    assert_gradients(gradients(engine.bank, "a"), before)
    assert gradients(engine.bank, "b") == {}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_validation_goes_through_in_parts_too() -> None:
    batch = batch_of(LENGTHS, ROUTES)
    expected = logprobs(Engine(make_bank()), batch)
    engine = Engine(make_bank())
    with memory_for(engine, 30) as tried:
        torch.testing.assert_close(logprobs(engine, batch), expected, rtol=1e-4, atol=1e-5)
    assert len(tried) > 2


def margin(inputs: Any) -> Tensor:
    """A loss that needs each row's reference."""
    return inputs.per_row(-(inputs.logprobs_T - inputs.reference_logprobs_T).sigmoid())


@pytest.mark.parametrize("given", [False, True])
def test_a_row_and_its_reference_stay_together(given: bool) -> None:
    batch = batch_of((5, 9, 7), ["a", "b", "a"])
    results = []
    for tokens in (1000, 25):
        engine = Engine(make_bank(), loss=margin)
        reference = logprobs(engine, batch_of((5, 9, 7))) if given else None
        with memory_for(engine, tokens) as tried:
            losses = forward_backward(engine, batch if given else with_base_references(batch), reference_logprobs_NL=reference)
        results.append((losses, {name: gradients(engine.bank, name) for name in "ab"}))
        assert (len(tried) > 1) == (tokens == 25)
    assert_same(results[1], results[0])


def test_memory_that_was_held_for_speed_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_bank())
    held = [True]

    def release(self: Engine) -> bool:
        return held.pop() if held else False

    monkeypatch.setattr(Engine, "release", release)
    with memory_for(engine, 40) as tried:
        found(engine)
    assert tried[:2] == [(6, 12), (6, 12)]  # once more, as it was, before it is halved
    assert re.fullmatch(r"\d+", str(engine.fits.tokens))
