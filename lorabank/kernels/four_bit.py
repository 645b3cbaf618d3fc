"""Frozen products with a weight in 4 bits (NF4 or FP4, arXiv:2305.14314), as bitsandbytes packs it.

`base` is [packed uint8 (O·I/2, 1), absmax fp32 (blocks)]: two numbers a byte, the first in the high half, a block of consecutive
numbers sharing one factor. With factors in 8 bits (double quantisation, section 3 there) it is [packed, absmax uint8 (blocks),
absmax of these fp32 (blocks / 256), their code fp32 (256), offset fp32 ()]. The weight is dequantised by bitsandbytes for each
product and freed after it. `quantize` and `dequantize_plain` are the plain twins of what bitsandbytes does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Numbers that share a factor, unless the weight came otherwise."""
FACTORS = 256
"""Factors in 8 bits that share a factor of their own."""
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
"""What the sixteen codes stand for."""


def block_size(numbers: int, blocks: int) -> int:
    """How many numbers share a factor: a power of two, so it follows from how many factors there are."""
    return max(32, 1 << (-(-numbers // blocks) - 1).bit_length())


def dequantize(base: Sequence[Tensor], quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (O, I) in `dtype`. Of `shape` one size may be -1."""
    packed, absmax = base[0], _factors(base)
    numbers = 2 * packed.numel()
    known = max(shape)
    shape = (shape[0] if shape[0] > 0 else numbers // known, shape[1] if shape[1] > 0 else numbers // known)
    block = block_size(numbers, absmax.numel())
    # asked for flat: its CPU kernel (0.50) lets no block reach over the end of a row, which blocks do
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block, quant_type, [numbers], dtype).view(shape)


def _factors(base: Sequence[Tensor]) -> Tensor:
    """Each block's absmax, fp32."""
    if len(base) == 2:
        return base[1]
    _, rounded, absmax, code, offset = base
    return torch.ops.bitsandbytes.dequantize_blockwise(rounded, absmax, code, FACTORS, torch.float32) + offset


def forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None, quant_type: str) -> Tensor:
    """(x (…, I), base, bias) → y (…, O), in x's dtype."""
    weight_OI = dequantize(base, quant_type, (-1, x.shape[-1]), x.dtype)
    return F.linear(x, weight_OI, None if bias is None else bias.to(x.dtype))


def input_grad(dy: Tensor, base: Sequence[Tensor], quant_type: str) -> Tensor:
    """(dy (…, O), base) → dx (…, I), in dy's dtype."""
    return dy @ dequantize(base, quant_type, (dy.shape[-1], -1), dy.dtype)


def quantize(weight: Tensor, quant_type: str = "nf4", block: int = BLOCK) -> list[Tensor]:
    """A weight of an even number of numbers as a product's `base`."""
    code, flat = _code(quant_type, weight.device), weight.float().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    order = code.argsort()
    borders = (code[order][1:] + code[order][:-1]) / 2
    nearest = order[torch.bucketize(blocks / absmax.clamp(min=1e-38)[:, None], borders)].view(-1)[: flat.numel()]
    pairs = nearest.to(torch.uint8).view(-1, 2)
    return [(pairs[:, 0] << 4 | pairs[:, 1])[:, None], absmax]


def dequantize_plain(base: Sequence[Tensor], quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`dequantize`, without bitsandbytes; the shape given in full."""
    packed, absmax = base[:2]
    if len(base) > 2:
        _, rounded, inner, code, offset = base
        absmax = code[rounded.long()] * inner.repeat_interleave(FACTORS)[: rounded.numel()] + offset
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), 1).reshape(-1).long()
    values, block = _code(quant_type, packed.device)[codes], block_size(codes.numel(), absmax.numel())
    return (values * absmax.repeat_interleave(block)[: values.numel()]).to(dtype).view(shape)


def _code(quant_type: str, device: torch.device) -> Tensor:
    return _on_cpu(quant_type).to(device)


@functools.cache
def _on_cpu(quant_type: str) -> Tensor:
    return torch.tensor(CODES[quant_type])
