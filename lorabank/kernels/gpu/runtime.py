"""Whether the Triton kernels can run for a device, and why not.

Nothing here imports Triton before it is asked for: a machine without it works, on plain torch. With TRITON_INTERPRET=1 set
before the first import, kernels run on CPU tensors through Triton's interpreter, which is how their tests run without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

SWITCH = "LORABANK_TRITON"
"""Environment variable: 0 keeps every product on plain torch."""
OLDEST = (7, 5)
"""Compute capability that Triton still compiles for."""


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why Triton kernels can't run for tensors on `device`, as a sentence for people; None when they can."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set"
    if device.type != "cuda":
        return f"Triton kernels are for CUDA GPUs, not for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name, have = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"{name} has compute capability {have}; Triton needs {'.'.join(map(str, OLDEST))} or newer"
    return None


def available(device: torch.device) -> bool:
    """Whether Triton kernels run for tensors on `device`. A GPU that must do without them is told about once."""
    reason = missing(device)
    if reason is not None and device.type == "cuda" and os.environ.get(SWITCH, "1") != "0":
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"training runs on plain torch, slower: {reason}", stacklevel=3)
