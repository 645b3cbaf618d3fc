"""`base_dtype: fp8 | nf4` while loading, and through a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorabank as lb
from lorabank.bank.fp8_linear import Fp8Linear
from lorabank.bank.quantized import storage_of
from lorabank.errors import ConfigError
from lorabank.models.load import load_base

ROWS = [{"prompt": f"word {i}: ", "completion": "abcdef"[i % 6] * 8} for i in range(24)]


def test_fp8_quantises_the_linear_layers_and_notes_the_cpu(tiny: Path) -> None:
    base = load_base(str(tiny), dtype="fp8", device="cpu")
    assert base.dtype == torch.float32 and storage_of(base.model) == "fp8"
    assert sum(isinstance(module, Fp8Linear) for module in base.model.modules()) == 10  # keys and values have 16 rows
    assert type(base.model.get_output_embeddings()) is nn.Linear
    assert [note for note in base.notes if "no fp8 products here (cpu has none): each product dequantises" in note]
    assert not base.model.training


def test_nf4_quantises_with_bitsandbytes(tiny: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    base = load_base(str(tiny), dtype="nf4", device="cpu")
    assert storage_of(base.model) == "nf4"


def test_a_run_over_an_fp8_base_learns_as_over_fp32(tiny: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("fp32", "fp8"):
        result = lb.train(
            model=str(tiny),
            base_dtype=dtype,
            device="cpu",
            data=ROWS,
            output=str(tmp_path / dtype),
            adapters={"a": {"rank": 4, "max_steps": 6, "learning_rate": 1e-2, "batch_size": 4}},
        )
        losses[dtype] = result.adapters["a"].final_metrics["loss"]
        adapter = lb.Adapter.load(tmp_path / dtype / "a")
        assert adapter.metadata.get("base_storage") == (None if dtype == "fp32" else "fp8")
        other = load_base(str(tiny), dtype="fp8" if dtype == "fp32" else "fp32", device="cpu")
        lb.attach(other.model).load("a", adapter)
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_model_object_must_be_stored_as_asked_for(tiny: Path) -> None:
    plain, quantized = load_base(str(tiny), device="cpu"), load_base(str(tiny), dtype="fp8", device="cpu")
    for base, dtype, message in (
        (
            plain,
            "fp8",
            r"base_dtype: 'fp8' asked for, and the model given is torch.float32. Quantise it first: lorabank.quantize_base",
        ),
        (quantized, "nf4", r"base_dtype: 'nf4' asked for, and the model given is fp8. Quantise it first"),
        (quantized, "fp32", r"base_dtype: 'fp32' asked for, and the model given is fp8. Load it unquantised"),
    ):
        with pytest.raises(ConfigError, match=message):
            lb.train(model=base.model, tokenizer=base.tokenizer, base_dtype=dtype, data=ROWS)


def test_what_is_not_there_yet_is_named() -> None:
    with pytest.raises(ConfigError, match=r"base_dtype: int8 is not supported yet. Use fp8, nf4, bf16 or fp32"):
        lb.TrainConfig(base_dtype="int8")
