"""`lorabank::lora_linear` over quantised bases: y and the gradients of x, A and B against the plain definition."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels import four_bit, fp8, reference
from lorabank.kernels.gpu import op
from lorabank.kernels.gpu.storage import STORAGES
from lorabank.kernels.segments import Segment
from lorabank.kernels.tables import route_tables
from tests.kernels.test_four_bit import doubly_quantised

OUT, IN, RANKS = 32, 64, {0: (0, 3), 2: (3, 5)}
ROWS = {0: [0, 3], 2: [1]}


QUANTISED = ["fp8", "nf4", "fp4", "nf4, factors too"]


def plain_name(storage: str) -> str:
    """As `STORAGES` has it."""
    return storage.partition(",")[0]


def stored(weight: Tensor, storage: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """The base, and the weights (O, I) that its two products stand for."""
    if storage == "fp8":
        base = fp8.quantize_weight(weight)
        back = fp8.dequantize_rows(base[2], base[3], weight.dtype).t()
        return base, fp8.dequantize_rows(base[0], base[1], weight.dtype), back
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    kind = plain_name(storage)
    base = four_bit.quantize(weight, kind) if storage == kind else doubly_quantised(weight, kind)
    plain = four_bit.dequantize_plain(base, kind, (OUT, IN), weight.dtype)
    return base, plain, plain


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("storage", QUANTISED)
def test_the_op_over_a_quantised_base(storage: str, bias: bool, compiled: bool, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    base, weight, weight_back = stored(random(OUT, IN), storage)
    b, dy = random(OUT) if bias else None, random(4, 7, OUT)
    leaves = [random(4, 7, IN), random(8, IN), random(8, OUT)]

    def given() -> list[Tensor]:
        return [leaf.clone().requires_grad_() for leaf in leaves]

    x, A, B = first = given()
    tables = route_tables(ROWS, 4, 7, 8).to(device)
    ranks = torch.tensor([RANKS.get(slot, (0, 0)) for slot in range(8)], dtype=torch.int32, device=device)
    scaling = torch.ones(8, device=device)

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return op.lora_linear(x, base, b, A, B, ranks, scaling, *tables.tensors, plain_name(storage), table_width(5), [])[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # the compiler's own
        y = (torch.compile(call) if compiled else call)(x, A, B)
        found = [y, *torch.autograd.grad(y, first, dy)]

    x, A, B = second = given()
    segments = [
        Segment(rows=torch.tensor(rows, device=device), A_RI=A[s : s + r], B_RO=B[s : s + r], scaling=1.0)
        for slot, rows in ROWS.items()
        for s, r in [RANKS[slot]]
    ]
    plain = reference.lora_linear(x, weight, b, segments, 4)
    # the storage's backward reads its second copy
    grads = torch.autograd.grad(plain, second, dy)
    expected = [plain, grads[0] + dy @ (weight_back - weight), *grads[1:]]
    tolerance = 0.06 if fp8.runs_on(device) and storage == "fp8" else 2e-5  # there the input is rounded to 4 bits as well
    for name, mine, theirs in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        error = float((mine - theirs).detach().norm() / theirs.detach().norm())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("storage", QUANTISED)
def test_both_forms_of_a_storages_products_agree(storage: str) -> None:
    base, weight, back = stored(torch.randn(OUT, IN), storage)
    x, dy, bias, kind = torch.randn(5, IN), torch.randn(5, OUT), torch.randn(OUT), STORAGES[plain_name(storage)]
    y, dx = kind.forward(x, base, None), kind.input_grad(dy, base)
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(dx, dy @ back)
    torch.testing.assert_close(kind.forward(x, base, bias), y + bias)
    if kind.add_forward is not None and kind.add_input_grad is not None:
        for add, given, fresh in ((kind.add_forward, x, y), (kind.add_input_grad, dy, dx)):
            out = torch.ones_like(fresh)
            add(out, given, base)
            torch.testing.assert_close(out, fresh + 1)
    if storage != "fp8":
        for given, turned in ((x, False), (dy, True)):
            torch.library.opcheck(torch.ops.lorabank.four_bit_product.default, (given, base, plain_name(storage), turned))


def test_every_storage_gives_fresh_contiguous_tensors() -> None:
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    base = fp8.quantize_weight(torch.randn(OUT, IN))
    kind = STORAGES["fp8"]
    for found, size in ((kind.forward(x, base, None), (5, OUT)), (kind.input_grad(dy, base), (5, IN))):
        assert found.shape == size and found.is_contiguous()
    assert kind.add_forward is None and kind.add_input_grad is None
