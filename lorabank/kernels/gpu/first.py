"""The smallest kernel: whether Triton can compile one, build what starts it, and run it on a GPU, is seen by trying."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIZE = 32


@triton.jit
def _double(x, y):
    places = tl.arange(0, 32)
    tl.store(y + places, tl.load(x + places) * 2)


def failure(device: torch.device) -> str | None:
    """What goes wrong with a kernel on `device`, as a clause for people; None when nothing does."""
    x = torch.arange(SIZE, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    try:
        with torch.cuda.device_of(x):  # kernels start on the current GPU
            _double[(1,)](x, y)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a compiler, its headers, a driver or a cache folder does
        said = " ".join(str(error).split())[:200]
        return f"Triton's first kernel can't be run ({type(error).__name__}: {said})"
    return None if torch.equal(y, x * 2) else "Triton's first kernel gives wrong numbers"
