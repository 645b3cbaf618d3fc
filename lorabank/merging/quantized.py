"""What rounding to a quantised storage does to a weight: why merging there is refused, and what a merge elsewhere should say."""

from __future__ import annotations

import torch
from torch import Tensor

from lorabank.formats.adapter import AdapterLayer
from lorabank.kernels import four_bit, fp8

STORAGES = ("fp8", "nf4", "fp4")


def rounded(weight_OI: Tensor, storage: str) -> Tensor:
    """The weight as `storage` would hold it, fp32; of 4 bits with factors that aren't rounded in turn."""
    if storage == "fp8":
        return fp8.dequantize_rows(*fp8.quantize_rows(weight_OI), torch.float32)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    return four_bit.dequantize_plain(four_bit.quantize(weight_OI, storage), storage, shape, torch.float32)


def refusal(path: str, weight_OI: Tensor, layer: AdapterLayer, storage: str, strength: float) -> str:
    """Why ΔW isn't written into a weight (fp32, dequantised) that is stored in `storage`, with what would be lost of it."""
    delta = strength * layer.delta().to(weight_OI.device, torch.float32)
    wanted, size = weight_OI + delta, float(delta.norm())
    here, in_bf16 = (_share(stored - wanted, size) for stored in (rounded(wanted, storage), wanted.bfloat16().float()))
    change = size / max(float(weight_OI.norm()), 1e-30)
    return (
        f"merge: {path}.weight is stored in {storage}: rounding there would lose {here} of its ΔW (‖Δ‖/‖W‖ = {change:.2g}), in "
        f"bf16 {in_bf16}. Load the base in fp32 or bf16, as it was before it was quantised, and merge into that; or serve the "
        "adapter beside this base."
    )


def _share(lost: Tensor, size: float) -> str:
    share = float(lost.norm()) / size if size else 0.0
    return f"{share:.0%}" if share < 1 else "all"
