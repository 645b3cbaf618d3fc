"""FlashAttention 4's kernels as an op: torch's attention, outputs and gradients, also compiled; and who does without it.

On a machine without a GPU the kernels are stood in for by torch's, called the way the package is: what is held is the op.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabank.kernels.gpu import flash
from tests.kernels.gpu.stand_in import plain, stand_in


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones on a GPU that they are for, torch's otherwise."""
    if device.type == "cuda" and flash.ready(device, 64, 2):
        return
    monkeypatch.setattr(flash, "_interface", stand_in)


def given(device: torch.device, dtype: torch.dtype, heads: int, shared: int, features: int, tokens: int = 70) -> list[Tensor]:
    """q, k, v as leaves and a gradient of the result."""
    generator = torch.Generator().manual_seed(features + heads)
    sizes = (heads, heads // shared, heads // shared, heads)
    made = [torch.randn(2, tokens, count, features, generator=generator).to(device, dtype) for count in sizes]
    return [*(t.requires_grad_() for t in made[:3]), made[3]]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "shared", "features", "tokens"), [(4, 2, 64, 70), (2, 1, 128, 131), (8, 8, 64, 1)])
def test_equals_torchs_attention(
    heads: int, shared: int, features: int, tokens: int, causal: bool, compiled: bool, device: torch.device
) -> None:
    q, k, v, dy = given(device, torch.bfloat16, heads, shared, features, tokens)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.flash_attention(q * 2, k, v, 0.2, causal)[0] * 3

    y = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(q, k, v)
    grads = torch.autograd.grad(y, (q, k, v), dy)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    wanted = plain(exact[0] * 2, exact[1], exact[2], 0.2, causal) * 3
    for name, mine, other in zip("yqkv", (y, *grads), (wanted, *torch.autograd.grad(wanted, exact, dy.float())), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - other).norm() <= 1e-2 * other.norm() + 1e-3, name  # a row of one token has no gradient of q and k


@pytest.mark.usefixtures("kernels")
def test_rows_that_lie_across_each_other(device: torch.device) -> None:
    """Heads outside of tokens, as rotation may leave them, and a gradient that is one number expanded."""
    q, k, v, _ = given(device, torch.float16, 4, 2, 64)
    across = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    straight, other = (flash.flash_attention(*t, 0.2, True)[0] for t in ((q, k, v), across))
    torch.testing.assert_close(straight, other)
    for mine, wanted in zip(
        torch.autograd.grad(other.sum(), across), torch.autograd.grad(straight.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_the_op_says_rightly_what_it_gives(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(flash, "_interface", stand_in)
    elif not flash.ready(device, 64, 2):
        pytest.skip("flash-attn-4 isn't installed, or this GPU isn't for it")
    q, k, v, _ = given(device, torch.bfloat16, 4, 2, 64)
    torch.library.opcheck(flash.flash_attention, (q, k, v, 0.2, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"features": 80}, False),
        ({"keys": 8}, False),
        ({"heads": 3}, False),
    ],
)
def test_what_it_takes(change: dict[str, Any], expected: bool) -> None:
    asked: dict[str, Any] = {"dtype": torch.float16, "features": 64, "keys": 5, "heads": 4} | change
    q = torch.empty(1, asked["heads"], 5, asked["features"], dtype=asked["dtype"])
    k = torch.empty(1, 2, asked["keys"], asked["features"], dtype=asked["dtype"])
    assert flash.takes(q, k, k) == expected


def test_a_machine_without_such_a_gpu_does_without() -> None:
    assert not flash.ready(torch.device("cpu"), 64, 2)


def test_a_first_try_tells_whether_the_package_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_interface", stand_in)
    assert flash.missing(torch.device("cpu")) is None
    monkeypatch.setattr(flash, "_interface", lambda: stand_in(0.5))
    assert "its output differs from torch's by" in str(flash.missing(torch.device("cpu")))
    monkeypatch.setattr(flash, "_interface", lambda: SimpleNamespace())
    assert "_flash_attn_fwd" in str(flash.missing(torch.device("cpu")))
    monkeypatch.setattr(flash, "_interface", stand_in)
    with torch.inference_mode():
        assert flash.missing(torch.device("cpu")) is None


@pytest.mark.parametrize(("switch", "tried"), [("1", True), ("0", False)])
def test_a_package_that_does_not_work_is_told_about(switch: str, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of the kind that it is for; the switch keeps it from being tried."""
    monkeypatch.setenv(flash.SWITCH, switch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: flash.CAPABILITY)
    monkeypatch.setattr(flash, "_installed", lambda: True)
    monkeypatch.setattr(flash, "missing", lambda *_: "AttributeError: no such kernel")
    flash.ready.cache_clear()
    expected = pytest.warns(
        UserWarning, match=r"flash-attn-4 is installed but doesn't work here.*no such kernel.*LORABANK_FLASH=0"
    )
    with expected if tried else contextlib.nullcontext():
        assert not flash.ready(torch.device("cuda", 7), 64, 2)
    flash.ready.cache_clear()


@pytest.mark.parametrize("installed", [True, False])
def test_heads_that_were_not_tried_are_told_about_where_the_package_is_there(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: flash.CAPABILITY)
    monkeypatch.setattr(flash, "_installed", lambda: installed)
    flash.ready.cache_clear()
    expected = pytest.warns(
        UserWarning, match="isn't used for this model.*heads of 96 features were not tried, those of 64 and 128"
    )
    with expected if installed else contextlib.nullcontext():
        assert not flash.ready(torch.device("cuda", 7), 96, 2)
    flash.ready.cache_clear()


def test_what_is_asked_for_is_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes long and may fail in many ways; another package has a module of that name, too."""
    monkeypatch.setattr(flash, "PACKAGE", "pytest")
    assert flash._installed()
    monkeypatch.setattr(flash, "PACKAGE", "no-such-package")
    assert not flash._installed()


@pytest.mark.parametrize("shared", [1, 4, 7])
def test_heads_of_all_kinds_are_tried(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    interface = stand_in()

    def forward(q: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(tuple(q.shape))
        return stand_in()._flash_attn_fwd(q, *args, **more)

    interface._flash_attn_fwd = forward
    monkeypatch.setattr(flash, "_interface", lambda: interface)
    assert flash.missing(torch.device("cpu"), 128, shared) is None
    assert seen == [(1, 200, 2 * shared, 128)]
