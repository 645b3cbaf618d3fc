"""The C functions compiled for vectors of several widths."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from lorabank.kernels.native import build, library

VECTORS: dict[str, tuple[str, ...]] = {"native": (), "256 bits": ("-mavx2", "-mfma"), "128 bits": ()}
"""What the compiler may use of an x86 processor; `native`: whatever this one has."""


def compiled_for(vectors: str, folder: Path) -> ctypes.CDLL:
    """The library for a key of `VECTORS`. Skips the test where the processor can't run it."""
    if vectors == "256 bits" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    flags = build.FLAGS if vectors == "native" else ("-O3", "-fPIC", "-fopenmp", "-fno-math-errno", *VECTORS[vectors])
    path = build.library_path(folder, flags)
    assert path is not None
    return library.load(path)
