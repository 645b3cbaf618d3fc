"""Settings of the laws' tests, and a process in which fp32 is fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorabank.engine.compiling import compile_blocks
from tests.gpu.laws import Setting

SETTINGS = [
    pytest.param((dtype, graphs), id=f"{str(dtype).removeprefix('torch.')}-{'graphs' if graphs else 'kernel by kernel'}")
    for dtype in (torch.float32, torch.bfloat16)
    for graphs in (False, True)
]


@pytest.fixture(autouse=True)
def true_fp32() -> Iterator[None]:
    """No TF32, whatever another test left behind."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    """A dtype, with CUDA graphs and without, on compiled blocks."""
    dtype, graphs = request.param
    return Setting(dtype=dtype, graphs=graphs, fuse=compile_blocks)
