"""The kernels of a gated MLP over an fp8 base, for gpu_kernels.py: what gated_op.py starts, on gpu_bordered.py's tensors.

C layers whose rows are rounded in one start: down's alone in forward, gate's and up's in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_bordered import SCALING, Mlp
from torch import Tensor

from lorabank.kernels import fp8
from lorabank.kernels.gpu import gated, rounding


def missing(device: torch.device) -> str | None:
    """Why these kernels aren't measured; None where they are."""
    return fp8.missing(device)


def _weights(p: Mlp, count: int) -> list[Tensor]:
    """B of gate and up, A of down, so that what they add to a product is about as large as that."""
    return [p.B / p.rank**0.5] * count


def activate(p: Mlp, weights: list[Tensor], maxima: Tensor) -> Tensor:
    """As `lora_gated_close` starts it."""
    return gated.activate(p.wide[1], p.wide[2], [p.narrow] * 2, weights[:2], p.tables, [p.ranks] * 2, "silu", maxima)


def middle(p: Mlp, weights: list[Tensor], maxima: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As its backward does."""
    dh, gate, up = p.wide
    return gated.middle(dh, gate, up, [p.narrow] * 3, weights, p.tables, [p.ranks] * 3, "silu", maxima)


def round_and_shrink(p: Mlp, weights: list[Tensor], maxima: Tensor) -> tuple[list[rounding.Rounded], list[Tensor]]:
    """Of h, by A of down."""
    return rounding.round_and_shrink([p.wide[0]], maxima, weights[:1], p.tables, [p.ranks], [p.scaling], p.width)


def round_outer_and_shrink(
    p: Mlp, weights: list[Tensor], maxima: Tensor
) -> tuple[list[rounding.Rounded], list[Tensor], list[Tensor]]:
    """Of the gradients of gate and up, by their B."""
    both = [p.wide[1], p.wide[2]]
    return rounding.round_outer_and_shrink(both, maxima, [p.narrow] * 2, weights[:2], p.tables, [p.ranks] * 2, [p.scaling] * 2)


def noted(rows: Tensor) -> Tensor:
    """Maxima (C, N) of rows (C, N, F) as whoever wrote them would note them; slots' tokens follow each other here."""
    return rows.abs().amax(-1).float().view(torch.int32)


def found_and_expected(p: Mlp) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each kernel's result and the same by torch in fp32, what is rounded by fp8.py."""
    weights = _weights(p, 3)
    change = torch.cat([p.narrow[t, : p.rank].float() @ weights[0][r].bfloat16().float() for t, r in p.slot_rows()])
    dh, gate, up = (part.float() + change for part in p.wide)
    value, slope = torch.sigmoid(gate) * gate, torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    maxima = rounding.maxima_like(p.x, 1)
    h = activate(p, weights, maxima)
    yield "activate, fp8", h, value * up
    yield "activate, fp8, largest", maxima.view(torch.float32)[0], h.float().abs().amax(1)
    maxima = rounding.maxima_like(p.x, 2)
    dgate, dup, (dA,) = middle(p, weights, maxima)
    yield "middle, fp8, dgate", dgate, dh * up * slope
    yield "middle, fp8, dup", dup, dh * value
    yield "middle, fp8, dA down", dA, _outer(p, value * up)
    yield "middle, fp8, largest", maxima.view(torch.float32), torch.stack([dgate, dup]).float().abs().amax(2)
    yield "quantize", _meant(rounding.quantize(p.x)), _meant(fp8.quantize_rows(p.x))
    (rounded,), (narrow,) = round_and_shrink(p, weights, noted(p.wide[:1]))
    yield "round_and_shrink, rows", _meant(rounded), _meant(fp8.quantize_rows(p.wide[0]))
    yield "round_and_shrink", narrow[:, : p.rank], _shrink(p, p.wide[0].float(), weights[0])
    both = round_outer_and_shrink(p, weights, noted(p.wide[1:]))
    for i, (rounded, grad, narrow) in enumerate(zip(*both, strict=True)):
        x = p.wide[1 + i]
        yield f"round_outer_and_shrink, rows {i}", _meant(rounded), _meant(fp8.quantize_rows(x))
        yield f"round_outer_and_shrink, outer {i}", grad, _outer(p, x.float())
        yield f"round_outer_and_shrink, narrow {i}", narrow[:, : p.rank], _shrink(p, x.float(), weights[i])


def _meant(rounded: rounding.Rounded) -> Tensor:
    """What e4m3 rows and their scales stand for."""
    return fp8.dequantize_rows(*rounded, torch.float32)


def _outer(p: Mlp, wide: Tensor) -> Tensor:
    return torch.cat([p.narrow[tokens, : p.rank].float().t() @ wide[tokens] for tokens, _ in p.slot_rows()])


def _shrink(p: Mlp, wide: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([SCALING * wide[tokens] @ weight[ranks].bfloat16().float().t() for tokens, ranks in p.slot_rows()])


def timings(p: Mlp) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(kernel, its start, bytes that it reads and writes at least)."""
    weights, (tokens, hidden), inner = _weights(p, 3), p.x.shape, p.wide.shape[2]
    one, two = noted(p.wide[:1]), noted(p.wide[1:])
    for_h, for_both = rounding.maxima_like(p.x, 1), rounding.maxima_like(p.x, 2)
    # bytes of a narrow tensor, of A or B, of a scale or a maximum for each row
    narrow, leaf, row = 2 * tokens * p.rank, 4 * p.B.numel(), 4 * tokens
    yield "activate, fp8", lambda: activate(p, weights, for_h), 6 * tokens * inner + 2 * (narrow + leaf) + row
    yield "middle, fp8", lambda: middle(p, weights, for_both), 10 * tokens * inner + 3 * (narrow + leaf) + leaf + 2 * row
    yield "quantize x", lambda: rounding.quantize(p.x), 3 * tokens * hidden + row
    yield "round_and_shrink", lambda: round_and_shrink(p, weights, one), 3 * tokens * inner + narrow + leaf + 2 * row
    yield (
        "round_outer_and_shrink",
        lambda: round_outer_and_shrink(p, weights, two),
        2 * (3 * tokens * inner + 2 * (narrow + leaf + row)),
    )
