"""Tiny models run fastest on one thread, and add up in one order there; the C products and torch's take turns."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from lorabank.kernels.native import library as native_library
from tests.kernels.vectors import VECTORS, compiled_for


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["C", "torch"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which path the module's LoRA products take where both would do."""
    if request.param == "C" and native_library.loaded() is None:
        pytest.skip("no C compiler here, or no OpenMP runtime that torch loads")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native_library, "loaded", lambda: None)
        yield request.param


@pytest.fixture(scope="module", params=VECTORS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C functions compiled for vectors of some width."""
    return compiled_for(request.param, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def library(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The same, in force for a test."""
    monkeypatch.setattr(native_library, "loaded", lambda: compiled)
    return compiled
