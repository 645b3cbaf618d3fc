"""What rounding to a quantised storage does to a weight, and a changed weight put into the tensors that held it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels import four_bit, fp8

STORAGES = ("fp8", "nf4", "fp4")


def rounded(weight_OI: Tensor, storage: str) -> Tensor:
    """The weight as `storage` would hold it, fp32; of 4 bits with factors that aren't rounded in turn."""
    if storage == "fp8":
        return fp8.dequantize_rows(*fp8.quantize_rows(weight_OI), torch.float32)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    return four_bit.dequantize_plain(four_bit.quantize(weight_OI, storage), storage, shape, torch.float32)


def requantized(storage: str, stored: Sequence[Tensor], weight_OI: Tensor) -> list[Tensor]:
    """`weight_OI` in the form of `stored`, a product's base (kernels/fp8.py, kernels/four_bit.py), tensor by tensor.

    A weight that `stored` holds comes out as the same numbers, but for fp8's turned copy, which was rounded from an older weight.
    """
    if storage == "fp8":
        return fp8.quantize_weight(weight_OI)
    packed, factors = stored[:2]
    block = four_bit.block_size(2 * packed.numel(), factors.numel())
    new_packed, absmax = four_bit.quantize(weight_OI, storage, block)
    new_packed = new_packed.view(packed.shape)
    if len(stored) == 2:
        return [new_packed, absmax]
    _, _, _, code, offset = stored
    # the old offset: its mean would move by the rounding of the factors, and with it weights that aren't changed
    blocks = F.pad(absmax - offset, (0, -absmax.numel() % four_bit.FACTORS)).view(-1, four_bit.FACTORS)
    inner = blocks.abs().amax(1)
    order = code.argsort()
    borders = (code[order][1:] + code[order][:-1]) / 2
    nearest = order[torch.bucketize(blocks / inner.clamp(min=1e-38)[:, None], borders)].view(-1)[: absmax.numel()]
    return [new_packed, nearest.to(torch.uint8), inner, code, offset]
