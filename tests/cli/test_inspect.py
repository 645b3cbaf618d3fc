"""`lorabank inspect`: numbers against their definitions, what stands out, who reads it, and files that lie."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabank.cli.inspect_adapter import bars
from lorabank.cli.main import main
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.measure import HUGE, findings, kind_of, measure, measures

PATHS = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]


def many(folder: Path, scales: dict[int, float] | None = None, *, nan_in: int | None = None) -> Path:
    """Twelve layers of one kind and nearly one norm; those in `scales` are multiplied."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, AdapterLayer] = {}
    for i, path in enumerate(PATHS):
        A, B = torch.randn(4, 32, generator=generator), 0.02 * torch.randn(32, 4, generator=generator)
        layers[path] = AdapterLayer(A, B * (scales or {}).get(i, 1.0), 2.0)
    if nan_in is not None:
        layers[PATHS[nan_in]].B[0, 0] = math.nan
    from lorabank.config.adapter import AdapterConfig

    return Adapter(config=AdapterConfig(rank=4, alpha=8, targets=["q_proj"]), layers=layers, base_model="tiny/base").save(folder)


def as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["inspect", str(folder), "--json"])
    return json.loads(capsys.readouterr().out)


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(["inspect", *words])
    return " ".join(capsys.readouterr().out.split())


def test_modules_in_full_are_shown_and_nan_in_them_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(many(tmp_path / "a"))
    folder = replace(adapter, modules={"score": {"weight": torch.ones(3, 32)}}).save(tmp_path / "b")
    assert "in full score (96)" in shown([str(folder)], capsys)
    told = as_json(folder, capsys)
    assert told["modules"] == {"score": 96}
    assert told["parameters"] == adapter.num_parameters + 96
    assert told["readers"]["vllm"] == []
    for reader in ("older vllm", "gguf"):
        assert any("trained in full" in each["what"] for each in told["readers"][reader])
    assert told["broken"] == []
    broken = replace(adapter, modules={"score": {"weight": torch.full((3, 32), math.nan)}}).save(tmp_path / "c")
    assert main(["inspect", str(broken)]) == 1
    assert "NaN or infinity in module score" in " ".join(capsys.readouterr().out.split())
    assert as_json(broken, capsys)["broken"] == ["score"]


@pytest.mark.parametrize("shape", [(5, 24, 40), (40, 24, 16), (1, 8, 8)], ids=["wide", "rank above the layer", "rank 1"])
def test_norms_are_those_of_the_change(shape: tuple[int, int, int]) -> None:
    rank, fan_in, fan_out = shape
    layer = AdapterLayer(torch.randn(rank, fan_in).double(), torch.randn(fan_out, rank).double(), -1.5)
    found = measure("a.q_proj", layer)
    values = torch.linalg.svdvals(layer.delta())
    assert found.norm == pytest.approx(float(layer.delta().norm()), rel=1e-9)
    assert found.spectral == pytest.approx(float(values[0]), rel=1e-9)
    shares = values / values.sum()
    shares = shares[shares > 1e-12]
    assert found.effective_rank == pytest.approx(math.exp(float(-(shares * shares.log()).sum())), rel=1e-4)
    assert found.gain == pytest.approx(found.norm / math.sqrt(fan_out))


def test_effective_rank_of_known_directions() -> None:
    rows = torch.eye(8)[:4]
    assert measure("x", AdapterLayer(rows, rows.t().contiguous(), 1.0)).effective_rank == pytest.approx(4)
    same = rows[:1].expand(4, 8).contiguous()
    assert measure("x", AdapterLayer(same, same.t().contiguous(), 1.0)).effective_rank == pytest.approx(1, abs=1e-4)
    nothing = measure("x", AdapterLayer(rows, torch.zeros(8, 4), 1.0))
    assert (nothing.effective_rank, nothing.norm, nothing.zero) == (0.0, 0.0, True)


def test_a_convolution_and_a_kind_of_an_expert() -> None:
    layer = AdapterLayer(torch.randn(2, 3, 3, 3), torch.randn(5, 2), 2.0)
    assert measure("conv", layer).norm == pytest.approx(float(layer.delta().norm()), rel=1e-5)
    assert kind_of("model.layers.0.mlp.experts.gate_up_proj.3") == "gate_up_proj"
    assert kind_of("3") == "3"


def test_block_two_comes_before_block_ten(tmp_path: Path) -> None:
    assert [layer.path for layer in measures(Adapter.load(many(tmp_path / "a")))] == PATHS


def test_outliers_are_told_by_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(many(tmp_path / "even"), capsys)["outliers"] == {}
    found = as_json(many(tmp_path / "odd", {3: 20.0, 7: 0.05}), capsys)["outliers"]
    assert set(found) == {PATHS[3], PATHS[7]}
    assert found[PATHS[3]] > 10
    assert found[PATHS[7]] < 0.1
    text = shown([str(tmp_path / "odd")], capsys)
    assert f"2 layers out of line with their kind: {PATHS[3]} (" in text
    assert "rule: over 3.5 robust deviations of log ‖ΔW‖ from the median of its kind, and 2 × it" in text


def test_few_layers_have_no_outliers() -> None:
    layers = [measure(f"{i}.q", AdapterLayer(torch.ones(1, 4), torch.ones(4, 1) * 10**i, 1.0)) for i in range(4)]
    assert findings(layers).outliers == {}


def test_huge_changes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = many(tmp_path / "a", {5: 1e4})
    found = as_json(folder, capsys)
    assert found["huge"] == [PATHS[5]]
    assert found["layers"][5]["gain"] > HUGE > found["layers"][4]["gain"]
    assert f"huge: the change alone makes outputs over 10 times their inputs in 1 layer: {PATHS[5]}" in shown(
        [str(folder)], capsys
    )


def test_zero_layers_and_a_healthy_rest(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(adapter_folder, capsys)["zero"] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert main(["inspect", str(adapter_folder)]) == 0


def test_nan_is_named_everywhere_and_the_rest_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = many(tmp_path / "a", nan_in=2)
    assert main(["inspect", str(folder)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"NaN or infinity in 1 layer: {PATHS[2]}" in text
    assert "largest model.layers." in text
    found = as_json(folder, capsys)
    assert found["broken"] == [PATHS[2]]
    assert found["layers"][2]["norm"] is None
    assert found["layers"][3]["norm"] > 0
    assert all(found["readers"].values()), "no tool should be said to read NaN"


def test_what_it_is_and_which_base(adapter_folder: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(adapter_folder, capsys)
    assert found["form"] == "PEFT folder with lorabank.json"
    assert found["base"] == {"name": str(base_folder), "fingerprint": None, "task_type": "CAUSAL_LM"}
    assert found["config"]["rank"] == 4
    assert found["parameters"] == sum(layer["parameters"] for layer in found["layers"]) == 512
    (adapter_folder / "lorabank.json").unlink()
    assert as_json(adapter_folder, capsys)["form"] == "PEFT folder"


def test_the_fingerprint_tells_bases_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorabank.formats.fingerprint import Fingerprint
    from tests.formats.conftest import CONFIGS, LLAMA_LEAVES, adapter_of, llama

    digests = []
    for index, seed in enumerate((0, 0, 1)):
        adapter = replace(adapter_of(llama(), LLAMA_LEAVES, CONFIGS["plain"]), fingerprint=Fingerprint.of(llama(seed)))
        digests.append(as_json(adapter.save(tmp_path / str(index)), capsys)["base"]["fingerprint"])
    assert digests[0] == digests[1] != digests[2]


def test_ranks_that_differ_and_what_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.formats.conftest import CONFIGS, LLAMA_LEAVES, adapter_of, llama

    folder = adapter_of(llama(), LLAMA_LEAVES, CONFIGS["patterns"]).save(tmp_path / "a")
    text = shown([str(folder)], capsys)
    assert "ranks 2 in 2, 4 in 3, 6 in 1" in text
    assert "older vLLM no: rank or scaling differ between layers" in text
    assert "vLLM 0.32 yes" in text
    assert "who reads it" in text


@pytest.mark.parametrize("flags", [[], ["--layers"]])
def test_it_fits_eighty_columns(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["inspect", str(many(tmp_path / "a", {3: 20.0})), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("q_proj" in line for line in lines)
    whole = sum(line.split()[:1] == [path] for line in lines for path in PATHS)
    assert whole == (12 if flags else 0)


def test_bars_show_the_course_through_the_blocks() -> None:
    assert bars([0.0, 1.0, 2.0, 4.0], 4.0) == "▁▃▅█"
    assert bars([1.0, math.nan], 1.0) == "█x"
    assert len(bars([1.0] * 30, 1.0)) == 8
    assert bars([0.0], 0.0) == "▁"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-64], "its tensors need .* bytes and it holds"),
        (lambda raw: (10**9).to_bytes(8, "little") + raw[8:], "its header claims 1000000000 bytes of a file of"),
        (lambda raw: raw.replace(b'"shape":[4,16]', b'"shape":[9,16]', 1), "needs .* bytes as F32"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "no valid JSON"),
    ],
    ids=["cut short", "a header of another size", "a shape that lies", "no JSON"],
)
def test_a_file_that_lies_is_refused_and_never_half_shown(
    spoil: Any, message: str, adapter_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    file = adapter_folder / "adapter_model.safetensors"
    (adapter_folder / "lorabank.json").unlink()
    raw = file.read_bytes()
    assert spoil(raw) != raw
    file.write_bytes(spoil(raw))
    assert main(["inspect", str(adapter_folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(message, said.err)
    assert str(file) in said.err


def test_a_tensor_of_other_settings_is_refused(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    (adapter_folder / "lorabank.json").unlink()
    tensors = {name: value[:2].contiguous() if "lora_A" in name else value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["inspect", str(adapter_folder)]) == 2
    assert "different ranks" in capsys.readouterr().err
