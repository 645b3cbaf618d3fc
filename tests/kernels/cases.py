"""Random LoRA products: one case is a base layer, an input and segments; it runs on the fast path and on the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorabank.kernels import ops, reference
from lorabank.kernels.base import BASE_PRODUCTS, FAST_PRODUCTS
from lorabank.kernels.segments import DropoutDraw, Outputs, Rows, Segment


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer's call. `weight_OI` has the linear map's orientation, whatever the layout."""

    x: Tensor
    weight_OI: Tensor
    bias_O: Tensor | None
    segments: tuple[Segment, ...]
    units: int
    layout: str = "linear"


def make_case(
    *,
    shape: Sequence[int] = (5, 3, 8),
    outputs: int = 6,
    rows: Sequence[Rows] = (slice(0, 2), slice(2, 4)),
    ranks: Sequence[int] = (2, 3),
    bias: bool = True,
    layout: str = "linear",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    dropout: float = 0.0,
    units: int | None = None,
    even: bool = False,
    parts: Sequence[Outputs | None] = (),
    seed: int = 0,
) -> Case:
    """`parts`: which outputs each segment changes.

    `even`: one scaling for all segments, and their tensors side by side in one buffer, as neighbouring slots have them."""
    g = torch.Generator().manual_seed(seed)
    inputs = shape[-1]
    units = shape[0] if units is None else units
    x = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5).to(dtype)
    segments = []
    for i, (where, rank) in enumerate(zip(rows, ranks, strict=True)):
        count, part = len(torch.arange(units)[where]), parts[i] if parts else None
        size = outputs if part is None else outputs // part.period * part.width
        segments.append(
            Segment(
                rows=where,
                A_RI=torch.randn(rank, inputs, generator=g, dtype=torch.float64).to(adapter_dtype),
                B_RO=torch.randn(rank, size, generator=g, dtype=torch.float64).to(adapter_dtype),
                scaling=0.5 + i * (not even),
                weights_U=torch.rand(count, generator=g) - 0.3 if weighted else None,
                dropout=DropoutDraw(probability=dropout, seed=7 + i, step=3, examples_U=torch.arange(count)) if dropout else None,
                outputs=part,
            )
        )
    if even:
        buffers = [torch.cat([s.A_RI for s in segments]), torch.cat([s.B_RO for s in segments])]
        parts = zip(*(buffer.split(list(ranks)) for buffer in buffers), strict=True)
        segments = [replace(s, A_RI=a, B_RO=b) for s, (a, b) in zip(segments, parts, strict=True)]
    return Case(
        x=x,
        weight_OI=weight,
        bias_O=torch.randn(outputs, generator=g, dtype=torch.float64).to(dtype) if bias else None,
        segments=tuple(segments),
        units=units,
        layout=layout,
    )


def make_plan(segments: Sequence[Segment], units: int, route_id: int = 1) -> ops.Plan:
    return ops.Plan(
        segments=tuple(segments),
        units=units,
        route=torch.tensor(route_id),
        route_id=route_id,
        layer="test",
        structure=0,
        structure_now=lambda: 0,
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Output and every gradient, by name."""

    y: Tensor
    gradients: dict[str, Tensor | None]


def run(case: Case, how: str, dy: Tensor | None = None, x_grad: bool = True, frozen: frozenset[str] = frozenset()) -> Outcome:
    """`how`: `reference`, `fused` (lora_linear), `fast` (the same, with base products that may round) or `added` (add_lora behind
    the base's own product). `frozen`: no gradient."""
    x = case.x.detach().requires_grad_(x_grad)
    leaves: dict[str, Tensor] = {}
    segments = []
    for i, segment in enumerate(case.segments):
        a = segment.A_RI.detach().clone().requires_grad_(f"A{i}" not in frozen)
        b = segment.B_RO.detach().clone().requires_grad_(f"B{i}" not in frozen)
        leaves |= {f"A{i}": a, f"B{i}": b}
        segments.append(replace(segment, A_RI=a, B_RO=b))
    product = (FAST_PRODUCTS if how == "fast" else BASE_PRODUCTS)[case.layout]
    stored = case.weight_OI if case.layout == "linear" else case.weight_OI.t().contiguous()
    if how == "reference":
        y = reference.lora_linear(x, case.weight_OI, case.bias_O, segments, case.units)
    elif how in ("fused", "fast"):
        y = ops.lora_linear(x, [stored], case.bias_O, product, make_plan(segments, case.units))
    else:
        y = ops.add_lora(product.forward(x, [stored], case.bias_O), x, make_plan(segments, case.units))
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) if dy is None else dy)
    return Outcome(y=y.detach(), gradients={"x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}})


def assert_same(fast: Outcome, slow: Outcome, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(fast.y, slow.y, rtol=rtol, atol=atol)
    assert fast.gradients.keys() == slow.gradients.keys()
    for name, expected in slow.gradients.items():
        found = fast.gradients[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert found.dtype == expected.dtype, name
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"gradient of {name}: {m}")
