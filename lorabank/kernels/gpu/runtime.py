"""Whether the Triton kernels can run for a device and a dtype, and why not.

Nothing here imports Triton before it is asked for: a machine without it works, on plain torch. With TRITON_INTERPRET=1 set
before the first import, kernels run on CPU tensors through Triton's interpreter, which is how their tests run without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch

from lorabank.notices import warn_once

SWITCH = "LORABANK_TRITON"
"""Environment variable: 0 keeps every product on plain torch."""
OLDEST = (7, 5)
"""Compute capability that Triton still compiles for."""
OLDEST_BF16 = (8, 0)
"""Compute capability from which on GPUs multiply bf16; older ones emulate it, and Triton doesn't compile for it there."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels multiply."""


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(device: torch.device) -> str | None:
    """Why our Triton kernels can't run for tensors on `device`, as a sentence for people; None when they can."""
    return f"{SWITCH}=0 is set" if switched_off() else _REFUSING.get(device) or unusable(device)


def refuse(device: torch.device, reason: str) -> bool:
    """Run no kernels of ours on `device` in this process any more. False where that was so already."""
    if missing(device) is not None:
        return False
    _REFUSING[device] = reason
    return True


_REFUSING: dict[torch.device, str] = {}
"""What was found out about a GPU when a kernel didn't run, beside what `unusable` finds out."""


@functools.cache
def unusable(device: torch.device) -> str | None:
    """Why Triton can't run kernels for tensors on `device`, ours or torch.compile's, whatever the user wants."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set"
    if device.type != "cuda":
        return f"Triton kernels are for CUDA GPUs, not for {device.type}"
    if too_old := _older_than(OLDEST, "Triton", device):
        return too_old
    if not _has_compiler():
        return "Triton starts its kernels through a C compiler, and none was found (install gcc or clang, or set CC)"
    return _try_one(device)


def _try_one(device: torch.device) -> str | None:
    from lorabank.kernels.gpu import first

    return first.failure(device)


def bf16_missing(device: torch.device, *, what: str = "bf16") -> str | None:
    """Why the GPU `device` has no bf16 products, as a clause for people; None when it has them, and for any other device.

    `what`: that needs such a GPU.
    """
    return None if device.type != "cuda" or torch.version.hip is not None else _older_than(OLDEST_BF16, what, device)


def is_tritons(error: Exception) -> bool:
    """Whether Triton raised this: it can't compile a kernel, or the GPU lacks what the kernel needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    return isinstance(error, TritonError)


@functools.cache
def refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels don't take numbers of `dtype` on `device`, where they run at all; None when they do."""
    if dtype not in DTYPES:
        return f"its numbers are {dtype}, and the kernels take fp32, bf16 and fp16"
    return bf16_missing(device) if dtype == torch.bfloat16 else None


def available(device: torch.device) -> bool:
    """Whether Triton kernels run for tensors on `device`. A GPU that must do without them is told about once."""
    reason = missing(device)
    if reason is not None and device.type == "cuda" and not switched_off():
        warn_once(f"training runs on plain torch, slower: {reason}. {SWITCH}=0 silences this.")
    return reason is None


def switched_off() -> bool:
    """Whether the user wants no Triton kernels."""
    return os.environ.get(SWITCH, "1") == "0"


def _older_than(needed: tuple[int, int], what: str, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    name, have, least = torch.cuda.get_device_name(device), ".".join(map(str, capability)), ".".join(map(str, needed))
    return f"{name} has compute capability {have}; {what} needs {least} or newer"


def _has_compiler() -> bool:
    """As Triton looks for one."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
