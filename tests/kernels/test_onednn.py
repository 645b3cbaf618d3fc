"""Frozen products through oneDNN against torch's own, in every layout, and which passes use them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import lorabank as lb
from lorabank.engine.batch import make_batch
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.kernels import onednn
from tests.engine.tiny import make_bank

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this build of torch has no oneDNN")
INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "3-D": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "one row": lambda x: x[0, 0],
    "no rows": lambda x: x[:0],
}
WEIGHTS = {
    "contiguous": lambda: torch.randn(5, 8),
    "transposed": lambda: torch.randn(8, 5).t(),
    "every other column": lambda: torch.randn(5, 16)[:, ::2],
}


BIASES: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "contiguous": lambda: torch.randn(5),
    "strided": lambda: torch.randn(5, 3)[:, 1],
    "expanded": lambda: torch.randn(1).expand(5),
}


@pytest.mark.parametrize("biased", BIASES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("rows", INPUTS)
def test_products_in_any_layout(rows: str, weight: str, biased: str) -> None:
    torch.manual_seed(0)
    x, w, bias = INPUTS[rows](torch.randn(4, 7, 8)), WEIGHTS[weight](), BIASES[biased]()
    torch.testing.assert_close(onednn.linear(x, w, bias), F.linear(x, w, bias))
    dy = torch.randn(*x.shape[:-1], 5)
    torch.testing.assert_close(onednn.input_grad(dy, w), dy @ w)


@needs_onednn
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_isnt_finite_reaches_no_other(bad: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(128, 64), torch.randn(96, 64)
    clean = onednn.linear(x, w)
    x[3, 5] = bad
    found = onednn.linear(x, w)
    others = [i for i in range(128) if i != 3]
    assert torch.equal(found[others], clean[others])
    assert not found[3].isfinite().any()


@needs_onednn
def test_only_fp32_outside_autocast_is_taken() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    assert onednn.suits(x, w)
    assert not onednn.suits(x.bfloat16(), w.bfloat16())
    assert not onednn.suits(x.to("meta"), w.to("meta"))
    with torch.autocast("cpu"):
        assert not onednn.suits(x, w)
        assert onednn.linear(x, w).dtype == torch.bfloat16
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, whose other settings warn
    try:
        assert not onednn.suits(x, w)
        assert torch.equal(onednn.linear(x, w), F.linear(x, w))
    finally:
        torch._C._set_mkldnn_enabled(True)


def _uses_onednn(work: Callable[[], object]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return any(event.key == "mkldnn::_linear_pointwise" for event in seen.key_averages())


@needs_onednn
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.12's profiler, of itself
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_engine_takes_them_and_a_plain_forward_keeps_the_base_bit_for_bit(family: str) -> None:
    bank = make_bank(family)
    engine = Engine(bank)
    batch = make_batch([([1, 2, 3, 4], [1.0] * 4)] * 2, ["a", lb.BASE])
    ids = torch.tensor([[1, 2, 3, 4]] * 2)
    assert _uses_onednn(lambda: forward_backward(engine, batch))
    assert _uses_onednn(lambda: logprobs(engine, batch))
    with bank.route(["a", lb.BASE]), torch.no_grad():
        assert not _uses_onednn(lambda: bank.model(ids))
    with bank.route(bank.routing(["a", lb.BASE], exact=False)), torch.no_grad():
        assert _uses_onednn(lambda: bank.model(ids))
