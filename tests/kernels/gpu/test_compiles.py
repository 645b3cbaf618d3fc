"""The kernels compile for GPUs that aren't here: Triton's interpreter runs things that its compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = 99 * 1024
"""Bytes of shared memory of a program on the smallest GPUs since Ampere."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.long), 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py", str(capability), "16", "64"],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = {line: int(line.split(" bytes shared")[0].rpartition(" ")[2]) for line in done.stdout.splitlines()}
    assert max(shared.values()) <= SHARED, [line for line, size in shared.items() if size > SHARED]
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert names >= {"_shrink", "_gather", "_expand", "_outer", "_through", "_fold", "_change"}
    assert names >= {"_widen", "_finish", "_activate", "_middle", "_write", "_outer_each", "_lay_parts", "_softmax_kernel"}
    assert (names >= {"_quantize", "_round", "_round_through", "_activate_raw", "_middle_raw"}) == (capability >= 89)
