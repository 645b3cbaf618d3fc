"""Which GPUs the kernels are for, and what is said where they are not. The GPUs are made up."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator

import pytest
import torch

from lorabank.kernels.gpu import first, runtime
from lorabank.notices import warn_once

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels compiled as on a GPU, whatever was found out before forgotten."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(runtime, "_try_one", lambda device: None)
    monkeypatch.setattr(runtime, "_REFUSING", {})
    caches = (runtime.unusable, runtime.refused, warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """A GPU of that name, with or without one in this machine."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


def test_a_new_gpu_takes_all_three_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H100", (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.available(GPU)
    for dtype in runtime.DTYPES:
        assert runtime.refused(GPU, dtype) is None
    assert runtime.bf16_missing(GPU) is None


def test_a_gpu_without_bf16_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Tesla T4", (7, 5))
    assert runtime.available(GPU)
    assert runtime.refused(GPU, torch.float32) is None
    assert runtime.refused(GPU, torch.float16) is None
    assert runtime.refused(GPU, torch.bfloat16) == "Tesla T4 has compute capability 7.5; bf16 needs 8.0 or newer"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    for device in (GPU, torch.device("cpu")):
        assert runtime.refused(device, dtype) == f"its numbers are {dtype}, and the kernels take fp32, bf16 and fp16"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("old", "Tesla P100 has compute capability 6.0; Triton needs 7.5 or newer"),
        ("no triton", r"Triton is not installed \(pip install triton\)"),
        (
            "no compiler",
            r"Triton starts its kernels through a C compiler, and none was found \(install gcc or clang, or set CC\)",
        ),
    ],
)
def test_what_is_missing_is_said_once_with_the_way_out(monkeypatch: pytest.MonkeyPatch, change: str, reason: str) -> None:
    pretend(monkeypatch, *(("Tesla P100", (6, 0)) if change == "old" else ("NVIDIA A100", (8, 0))))
    if change == "no triton":
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    if change == "no compiler":
        monkeypatch.delenv("CC")
        monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=rf"training runs on plain torch, slower: {reason}\. LORABANK_TRITON=0 silences this"):
        assert not runtime.available(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and not again
        assert not runtime.available(GPU)


def test_a_first_kernel_that_does_not_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a C compiler without Python's headers, which Triton passes on as it comes."""

    class Fails:
        def __getitem__(self, grid: object) -> object:
            raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    pretend(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setattr(runtime, "_try_one", lambda device: first.failure(torch.device("cpu")))
    monkeypatch.setattr(first, "_double", Fails())
    reason = r"Triton's first kernel can't be run \(CalledProcessError: Command '\['gcc', 'main.c'\]' returned non-zero"
    with pytest.warns(UserWarning, match=f"training runs on plain torch, slower: {reason}"):
        assert not runtime.available(GPU)


def test_a_first_kernel_that_is_wrong_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getitem__(self, grid: object) -> object:
            return lambda *args: None

    assert first.failure(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is None
    monkeypatch.setattr(first, "_double", Nothing())
    assert first.failure(torch.device("cpu")) == "Triton's first kernel gives wrong numbers"


def test_a_gpu_that_is_refused_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H100", (9, 0))
    assert runtime.refuse(GPU, "a kernel doesn't run there")
    assert runtime.missing(GPU) == "a kernel doesn't run there"
    assert not runtime.refuse(GPU, "another")
    assert runtime.unusable(GPU) is None


def test_whoever_switches_the_kernels_off_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setenv(runtime.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runtime.available(GPU)
    assert runtime.missing(GPU) == "LORABANK_TRITON=0 is set"


def test_another_device_is_named() -> None:
    assert runtime.missing(torch.device("mps")) == "Triton kernels are for CUDA GPUs, not for mps"
