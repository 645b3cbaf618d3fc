"""The fast path against its definition: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabank.errors import RoutingError
from lorabank.kernels import ops, reference
from lorabank.kernels.base import BASE_PRODUCTS
from lorabank.kernels.segments import Outputs
from tests.kernels.cases import Case, assert_same, make_case, make_plan, run

pytestmark = pytest.mark.usefixtures("products")
INDEX = torch.tensor
CASES: dict[str, dict[str, Any]] = {
    "one segment, all rows": {"rows": [slice(0, 5)], "ranks": [3]},
    "one slot for everything": {"rows": [slice(0, 1)], "ranks": [3], "units": 1},
    "contiguous, base rows left": {"rows": [slice(0, 2), slice(3, 4)], "ranks": [2, 3]},
    "scattered rows": {"rows": [INDEX([0, 3]), INDEX([1, 2])], "ranks": [2, 3]},
    "empty slice and empty index": {
        "rows": [slice(2, 2), INDEX([], dtype=torch.int64), slice(0, 2)],
        "ranks": [2, 3, 2],
        "weighted": True,
    },
    "no segments": {"rows": [], "ranks": []},
    "overlapping mixture": {
        "rows": [slice(0, 4), INDEX([0, 2, 4]), slice(1, 3)],
        "ranks": [2, 3, 1],
        "weighted": True,
    },
    "dropout": {"rows": [slice(0, 3), INDEX([3])], "ranks": [2, 3], "dropout": 0.4},
    "dropout and weights": {"rows": [slice(0, 3), INDEX([0, 4])], "ranks": [2, 3], "dropout": 0.4, "weighted": True},
    "no bias": {"bias": False},
    "2-D input": {"shape": (5, 8)},
    "4-D input": {"shape": (5, 2, 3, 8), "rows": [slice(0, 2), INDEX([2, 4])]},
    "1-D input": {"shape": (8,), "rows": [slice(0, 1)], "ranks": [2], "units": 1},
    "units are packed tokens": {"shape": (1, 6, 8), "units": 6, "rows": [slice(0, 4), INDEX([5])]},
    "alike and side by side": {"rows": [slice(0, 2), slice(2, 4)], "ranks": [3, 3], "even": True},
    "a run of alike segments among others": {
        "shape": (9, 2, 8),
        "rows": [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 7), INDEX([7, 8])],
        "ranks": [3, 3, 3, 3, 3],
        "even": True,
    },
    "alike but overlapping": {"rows": [slice(0, 2), slice(1, 3)], "ranks": [3, 3], "even": True},
    "alike with dropout": {"rows": [slice(0, 2), slice(2, 4)], "ranks": [3, 3], "even": True, "dropout": 0.4},
    "alike but for the rank": {"rows": [slice(0, 2), slice(2, 4)], "ranks": [3, 2], "even": True},
    "rank above the layer": {"ranks": [12, 9]},
    "some of the outputs": {
        "rows": [slice(0, 2), slice(0, 2), INDEX([1, 4]), slice(3, 5)],
        "ranks": [2, 3, 2, 3],
        "parts": [Outputs(0, 2, 6), Outputs(3, 3, 6), Outputs(1, 1, 3), None],
    },
    "some of the outputs, alike and side by side": {
        "rows": [slice(0, 2), slice(2, 4)],
        "ranks": [3, 3],
        "even": True,
        "parts": [Outputs(1, 2, 6)] * 2,
    },
    "some of the outputs of packed tokens, dropped and weighed": {
        "shape": (1, 6, 8),
        "units": 6,
        "rows": [slice(0, 4), INDEX([1, 5])],
        "ranks": [2, 3],
        "parts": [Outputs(0, 1, 2), Outputs(2, 4, 6)],
        "dropout": 0.4,
        "weighted": True,
    },
    "one feature": {"shape": (4, 2, 1), "outputs": 1},
}


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("how", ["fused", "fast", "added"])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_is_the_definition(name: str, how: str, layout: str) -> None:
    case = make_case(**CASES[name], layout=layout)
    assert_same(run(case, how), run(case, "reference"))


@pytest.mark.parametrize("how", ["fused", "fast", "added"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_takes_fp32_adapters(dtype: torch.dtype, how: str) -> None:
    case = make_case(rows=[slice(0, 3), INDEX([0, 4])], ranks=[2, 3], dtype=dtype, weighted=True)
    fast, slow = run(case, how), run(case, "reference")
    assert fast.y.dtype == dtype
    assert fast.gradients["A0"] is not None
    assert fast.gradients["A0"].dtype == torch.float32
    # outputs and dx are rounded once or twice into the base's dtype; the adapters' own gradients see dy alone
    eps = torch.finfo(dtype).eps
    assert_same(fast, slow, rtol=4 * eps, atol=8 * eps)


def test_the_sum_is_rounded_once_into_the_bases_dtype() -> None:
    case = make_case(dtype=torch.bfloat16, rows=[slice(0, 5)], ranks=[2])
    base = F.linear(case.x, case.weight_OI, case.bias_O)
    exact = base.float() + reference.lora_delta(case.x, case.segments[0])
    assert torch.equal(run(case, "fused").y, exact.to(torch.bfloat16))


@pytest.mark.parametrize("how", ["fused", "fast", "added"])
def test_any_layout_of_dy_will_do(how: str) -> None:
    case = make_case(rows=[slice(0, 2), INDEX([2, 4])], ranks=[2, 3])
    expanded = torch.randn(6).expand(5, 3, 6)
    transposed = torch.randn(3, 5, 6).transpose(0, 1)
    for dy in (expanded, transposed, torch.zeros(5, 3, 6)):
        assert_same(run(case, how, dy), run(case, "reference", dy))


@pytest.mark.parametrize("how", ["fused", "fast", "added"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_any_layout_of_x_will_do(layout: str, how: str) -> None:
    for x in (torch.randn(3, 5, 8).transpose(0, 1), torch.randn(3, 8).expand(5, 3, 8), torch.randn(5, 3, 16)[..., ::2]):
        case = replace(make_case(rows=[slice(0, 2), INDEX([2, 4])], ranks=[2, 3], layout=layout), x=x)
        assert_same(run(case, how), run(case, "reference"))


@pytest.mark.parametrize("how", ["fused", "fast", "added"])
def test_an_input_without_gradient_and_frozen_tensors(how: str) -> None:
    case = make_case(rows=[slice(0, 3), INDEX([0, 4])], ranks=[2, 3], dropout=0.3)
    for frozen in (frozenset[str](), frozenset({"A0"}), frozenset({"B0", "B1"}), frozenset({"A0", "A1", "B0"})):
        for x_grad in (False, True):
            fast = run(case, how, x_grad=x_grad, frozen=frozen)
            assert_same(fast, run(case, "reference", x_grad=x_grad, frozen=frozen))
            assert (fast.gradients["x"] is None) != x_grad


@st.composite
def cases(draw: st.DrawFn) -> Case:
    units = draw(st.integers(1, 6))
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    count = draw(st.integers(0, 4))
    rows: list[slice | Tensor] = []
    for _ in range(count):
        if draw(st.booleans()):
            start = draw(st.integers(0, units))
            rows.append(slice(start, draw(st.integers(start, units))))
        else:
            rows.append(torch.tensor(sorted(draw(st.sets(st.integers(0, units - 1)))), dtype=torch.int64))
    return make_case(
        shape=(units, *middle, draw(st.integers(1, 9))),
        outputs=draw(st.integers(1, 9)),
        rows=rows,
        ranks=[draw(st.integers(1, 3)) for _ in range(count)],
        even=draw(st.booleans()) and count > 0,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["linear", "conv1d"])),
        weighted=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(), how=st.sampled_from(["fused", "fast", "added"]))
def test_random_shapes_and_routes(case: Case, how: str) -> None:
    assert_same(run(case, how), run(case, "reference"))


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_gradcheck_in_double_precision(layout: str) -> None:
    case = make_case(
        shape=(4, 2, 3),
        outputs=4,
        rows=[slice(0, 2), INDEX([1, 3])],
        ranks=[2, 1],
        dtype=torch.float64,
        adapter_dtype=torch.float64,
        weighted=True,
        layout=layout,
    )
    weight = case.weight_OI if layout == "linear" else case.weight_OI.t().contiguous()

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        pairs = [replace(s, A_RI=tensors[2 * i], B_RO=tensors[2 * i + 1]) for i, s in enumerate(case.segments)]
        return ops.lora_linear(x, [weight], case.bias_O, BASE_PRODUCTS[layout], make_plan(pairs, case.units))

    leaves = [case.x, *(t for s in case.segments for t in (s.A_RI, s.B_RO))]
    assert torch.autograd.gradcheck(call, [leaf.clone().requires_grad_() for leaf in leaves])


def test_the_base_products_are_the_layers_own_bit_for_bit() -> None:
    x = torch.randn(3, 5, 8)
    for bias in (True, False):
        linear = nn.Linear(8, 6, bias=bias)
        assert torch.equal(BASE_PRODUCTS["linear"].forward(x, [linear.weight], linear.bias), linear(x))
    conv = Conv1D(6, 8)
    assert torch.equal(BASE_PRODUCTS["conv1d"].forward(x, [conv.weight], conv.bias), conv(x))


@pytest.mark.parametrize("how", ["reference", "fused", "added"])
def test_rows_without_a_segment_are_not_written(how: str) -> None:
    case = make_case(rows=[slice(1, 2), INDEX([3, 4])], ranks=[2, 3])
    base = F.linear(case.x, case.weight_OI, case.bias_O)
    y = run(case, how).y
    assert torch.equal(y[[0, 2]], base[[0, 2]])
    assert not torch.isclose(y[[1, 3, 4]], base[[1, 3, 4]]).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["reference", "fused", "added"])
@pytest.mark.parametrize("rows", [[slice(0, 2), INDEX([2, 4])], [slice(0, 2), slice(2, 4)]])
def test_a_poisoned_slot_or_row_stays_alone(rows: list[Any], how: str, poison: float) -> None:
    clean = make_case(rows=rows, ranks=[3, 3], even=True)
    expected = run(clean, how)
    bad_B, bad_x = clean.segments[0].B_RO.clone(), clean.x.clone()
    bad_B[0, 0] = poison
    bad_x[0, 0, 0] = poison
    for case in (replace(clean, segments=(replace(clean.segments[0], B_RO=bad_B), clean.segments[1])), replace(clean, x=bad_x)):
        found = run(case, how)
        assert not found.y[0].isfinite().all()
        assert torch.equal(found.y[2:], expected.y[2:])
        for name in ("A1", "B1"):
            mine, theirs = found.gradients[name], expected.gradients[name]
            assert mine is not None
            assert theirs is not None
            assert torch.equal(mine, theirs)
        assert found.gradients["x"] is not None
        assert expected.gradients["x"] is not None
        assert torch.equal(found.gradients["x"][2:], expected.gradients["x"][2:])


def test_double_backward_is_refused_instead_of_being_wrong() -> None:
    case = make_case()
    x = case.x.requires_grad_()
    y = ops.lora_linear(x, [case.weight_OI], case.bias_O, BASE_PRODUCTS["linear"], make_plan(case.segments, case.units))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        dx.sum().backward()


def test_a_change_of_the_bank_before_backward_is_an_error() -> None:
    case = make_case()
    structure = 0
    plan = replace(make_plan(case.segments, case.units), structure_now=lambda: structure)
    y = ops.lora_linear(case.x.requires_grad_(), [case.weight_OI], case.bias_O, BASE_PRODUCTS["linear"], plan)
    structure = 1
    with pytest.raises(RoutingError, match=r"'test'.*added or removed between"):
        y.sum().backward()


def test_autocast_leaves_the_adapters_in_their_dtype() -> None:
    case = make_case(rows=[slice(0, 2), INDEX([2, 4])], ranks=[2, 3])
    exact = run(case, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, "fused")
    assert found.y.dtype == torch.bfloat16
    assert_same(
        replace(found, y=found.y.float()), exact, rtol=0.05, atol=0.1
    )  # three roundings to bf16: the base product, the sum and dy
    assert all(g is not None and g.dtype == torch.float32 for g in found.gradients.values())


def test_the_meta_device_gives_shapes() -> None:
    case = make_case()
    segments = [replace(s, A_RI=s.A_RI.to("meta"), B_RO=s.B_RO.to("meta")) for s in case.segments]
    y = ops.lora_linear(
        case.x.to("meta"), [case.weight_OI.to("meta")], None, BASE_PRODUCTS["linear"], make_plan(segments, case.units)
    )
    assert y.shape == (5, 3, 6)
