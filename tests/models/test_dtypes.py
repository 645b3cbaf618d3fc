"""A base's dtype on GPUs of several kinds, which are made up."""

from __future__ import annotations

import pytest
import torch

from lorabank.models.dtypes import dtype_notes
from lorabank.models.load import pick_dtype

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(params=[(7, 5), (8, 0), (9, 0)], ids=["T4", "A100", "H100"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)  # as torch says of what it emulates
    return request.param >= (8, 0)


@pytest.mark.parametrize("asked", ["auto", "fp8", "nf4"])
def test_auto_is_bf16_where_a_gpu_multiplies_it(has_bf16: bool, asked: str) -> None:
    assert pick_dtype(asked, GPU) == (torch.bfloat16 if has_bf16 else torch.float16)
    assert pick_dtype(asked, CPU) == torch.float32


def test_bf16_without_units_is_said(has_bf16: bool) -> None:
    notes = dtype_notes("bf16", torch.bfloat16, GPU)
    assert notes == (
        []
        if has_bf16
        else [
            "the base is in bf16, which this GPU only emulates, slowly (a GPU has compute capability 7.5; "
            "bf16 needs 8.0 or newer). Use base_dtype fp16."
        ]
    )


def test_fp32_that_was_not_asked_for_is_said_on_a_gpu(has_bf16: bool) -> None:
    (note,) = dtype_notes("auto", torch.float32, GPU)
    assert f"{'bf16' if has_bf16 else 'fp16'} takes half the memory" in note
    assert dtype_notes("fp32", torch.float32, GPU) == []
    assert dtype_notes("auto", torch.float32, CPU) == []


def test_fp16_that_was_not_asked_for_is_said(has_bf16: bool) -> None:
    notes = dtype_notes("auto", torch.float16, GPU)
    assert ["no bf16 units" in note for note in notes] == ([] if has_bf16 else [True])
    assert dtype_notes("fp16", torch.float16, GPU) == []
    for storage in ("fp8", "nf4"):  # what isn't quantised of it
        assert dtype_notes(storage, torch.float16, GPU) == notes


@pytest.mark.parametrize("device", [GPU, CPU])
def test_fp64_names_the_way_out(device: torch.device) -> None:
    assert "Convert it: model.to(torch.float32)" in dtype_notes("auto", torch.float64, device)[0]
