"""What a base's dtype means on a device: sentences for people, where it is slow or dangerous there."""

from __future__ import annotations

import torch

from lorabank.kernels.gpu import runtime


def dtype_notes(asked: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What a user should know of a base in `dtype` on `device`, where `asked` was the setting; of a model object, `auto`."""
    if dtype == torch.float16:
        return [
            "the base is in fp16, which overflows and underflows without a loss scale, and there is none: an adapter whose "
            "loss or gradient does stops. Convert it: model.to(torch.bfloat16), or torch.float32."
        ]
    if dtype == torch.float64:
        return ["the base is in fp64: every product takes its slowest path. Convert it: model.to(torch.float32)."]
    why = runtime.bf16_missing(device)
    if dtype == torch.bfloat16 and why is not None:
        return [f"the base is in bf16, which this GPU only emulates, slowly ({why}). Use base_dtype fp32."]
    if dtype == torch.float32 and device.type == "cuda" and asked == "auto":
        if why is not None:
            return [f"the base is kept in fp32, since this GPU has no bf16 units ({why}). nf4 saves memory here."]
        return ["the base is in fp32: bf16 takes half the memory and is several times as fast here (model.to(torch.bfloat16))."]
    return []
