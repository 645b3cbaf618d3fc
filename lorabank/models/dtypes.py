"""What a base's dtype means on a device: sentences for people, where it is slow or dangerous there."""

from __future__ import annotations

import torch

from lorabank.kernels.gpu import runtime


def dtype_notes(asked: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What a user should know of a base in `dtype` on `device`, where `asked` was the setting; of a model object, `auto`."""
    if dtype == torch.float64:
        return ["the base is in fp64: every product takes its slowest path. Convert it: model.to(torch.float32)."]
    why = runtime.bf16_missing(device)
    if dtype == torch.float16 and asked in ("auto", "fp8", "nf4") and why is not None:
        return [f"the base is in fp16, with a loss scale for each adapter, since this GPU has no bf16 units ({why})"]
    if dtype == torch.bfloat16 and why is not None:
        return [f"the base is in bf16, which this GPU only emulates, slowly ({why}). Use base_dtype fp16."]
    if dtype == torch.float32 and device.type == "cuda" and asked == "auto":
        half = "bf16" if why is None else "fp16"
        return [f"the base is in fp32: {half} takes half the memory and is several times as fast here (base_dtype: {half})."]
    return []
