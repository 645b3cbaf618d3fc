"""What a base's dtype means on a device: sentences for people, where it is slow or dangerous there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from lorabank.formats.files import read_header
from lorabank.kernels.gpu import runtime

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By safetensors' names."""


def stored_in(folder: Path) -> torch.dtype | None:
    """The dtype that most numbers of a folder's safetensors have; None for one that a model isn't loaded in, or no such files."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        for entry in read_header(file).tensors.values():
            sizes[entry.dtype] += entry.end - entry.begin
    return _STORED.get(sizes.most_common(1)[0][0]) if sizes else None


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
