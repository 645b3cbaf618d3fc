"""`base_dtype: fp8 | nf4` while loading, and through a whole run."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lorabank as lb
from lorabank.api import load_run
from lorabank.bank.storages.fp8_linear import Fp8Linear
from lorabank.bank.storages.quantized import storage_of
from lorabank.cli.main import main
from lorabank.errors import ConfigError, MissingExtraError
from lorabank.models.load import LoadedBase, load_base

OTHER = r"adapter 'a': it was trained over a base in fp8, and this one isn't in that \(unquantised\)"

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
        told = contextlib.nullcontext() if dtype == "fp32" else pytest.warns(UserWarning, match=OTHER)
        with told:
            lb.attach(other.model).load("a", adapter)
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.01)


def test_what_was_trained_over_fp8_is_loaded_over_fp8(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    lb.train(
        model=str(tiny), base_dtype="fp8", device="cpu", data=ROWS, output=str(run), adapters={"a": {"rank": 4, "max_steps": 1}}
    )
    adapter = lb.Adapter.load(run / "a")
    for source, wanted in ((run, None), (run / "a", None), (run, ["base"])):
        loaded = load_run(source, wanted, device="cpu")
        assert storage_of(loaded.model) == "fp8"
        assert loaded.notes[0] == "the base is in fp8, as it was in training (dtype, or --dtype, takes another)"
    with pytest.warns(UserWarning, match=OTHER):
        assert storage_of(load_run(run, device="cpu", dtype="fp32").model) is None
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    assert main(["eval", str(run), "--data", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--max-rows", "1"]) == 0
    assert "note: the base is in fp8, as it was in training" in capsys.readouterr().err
    # beside one of another base there is none that is both's
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    adapter.save(other / "a")
    replace(adapter, metadata={}).save(other / "b")
    with pytest.warns(UserWarning, match=OTHER):
        assert storage_of(load_run(other, device="cpu").model) is None
    # without bitsandbytes
    replace(adapter, metadata={"base_storage": "nf4"}).save(tmp_path / "c")

    def lacking(name: str, **given: object) -> LoadedBase:
        if given["dtype"] == "nf4":
            raise MissingExtraError("nf4 needs bitsandbytes")
        return load_base(name, device="cpu")

    monkeypatch.setattr("lorabank.tasks.text_generation.load_base", lacking)
    with pytest.warns(UserWarning, match="trained over a base in nf4"):
        loaded = load_run(tmp_path / "c", device="cpu")
    assert storage_of(loaded.model) is None
    assert loaded.notes[0] == "the base was in nf4 in training, and can't be here: nf4 needs bitsandbytes"


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
