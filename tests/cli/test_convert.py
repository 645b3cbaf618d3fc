"""`lorabank convert` between every two forms: the same change, what can't be held, and nothing written on a refusal."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lorabank as lb
from lorabank import Adapter
from lorabank.cli import main
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.components import config_of
from lorabank.formats.convert import TARGETS
from lorabank.formats.difference import difference
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.kohya import save_kohya
from tests.formats.pipelines import PIPELINES, adapter_for, adapter_of, decomposed, holder, sd


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\..*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"diffusers\..*")
        yield


def place(folder: Path, form: str) -> Path:
    return folder / (f"{form}.safetensors" if form == "kohya" else form)


PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def small(scaling: float = 0.5, out: int = 8, **more: Any) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    layer = AdapterLayer(torch.randn(2, 6, generator=generator), torch.randn(out, 2, generator=generator), scaling, **more)
    return Adapter(config=config_of({PATH: layer}), layers={PATH: layer})


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
@pytest.mark.parametrize("name", PIPELINES)
def test_between_any_two(name: str, source: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_for(name)
    adapter = replace(adapter, metadata={"safetensors.modelspec.title": "T"})
    start, end = place(tmp_path, source), tmp_path / "new" / place(tmp_path, to).name
    TARGETS[source].save(adapter, start)
    assert main(["convert", str(start), str(end), "--to", to]) == 0
    text = capsys.readouterr().out
    assert f"{source} to {to}: {len(adapter.layers)} layers" in text
    assert "metadata kept: modelspec.title" in text
    assert "read back: exact" in text
    again = Adapter.load(end)
    assert again.metadata["safetensors.modelspec.title"] == "T"
    assert difference(adapter.layers, again.layers).worst == 0
    assert not list(end.parent.glob(".*"))


def test_dora_between_any_two(tmp_path: Path) -> None:
    model = holder(sd())
    adapter = decomposed(adapter_of(model), model)
    path = save_kohya(adapter, tmp_path / "a.safetensors")
    for source, to in (("kohya", "peft"), ("peft", "diffusers"), ("diffusers", "kohya")):
        end = place(tmp_path / "out", to)
        assert main(["convert", str(path), str(end), "--to", to]) == 0, source
        path = end
    assert difference(adapter.layers, Adapter.load(path).layers).worst == 0


def test_there_and_back_gives_the_same_file(tmp_path: Path) -> None:
    start = save_kohya(replace(adapter_for("sd"), base_model="b"), tmp_path / "a.safetensors")
    assert main(["convert", str(start), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    assert main(["convert", str(tmp_path / "d"), str(tmp_path / "b.safetensors"), "--to", "kohya"]) == 0
    assert (tmp_path / "b.safetensors").read_bytes() == start.read_bytes()


def test_rounding_needs_lossy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = save_kohya(small(), tmp_path / "a.safetensors")
    line = ["convert", str(start), str(tmp_path / "out"), "--to", "peft", "--dtype", "bf16"]
    assert main(line) == 2
    assert "Nothing was written; --lossy allows it" in capsys.readouterr().err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.safetensors"]
    assert main([*line, "--lossy"]) == 0
    layer, before = Adapter.load(tmp_path / "out").layers[PATH], small().layers[PATH]
    assert layer.A.dtype == torch.bfloat16
    measured = float((layer.delta().float() - before.delta()).norm() / before.delta().norm())
    assert 1e-4 < measured < 1e-2
    stated = capsys.readouterr().out.partition("relative error ")[2].partition(" ")[0]
    assert float(stated) == pytest.approx(measured, rel=0.3)  # delta() itself rounds in bf16


def test_numbers_too_large_for_the_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = small()
    large = replace(adapter.layers[PATH], B=adapter.layers[PATH].B * 1e6, scaling=1e-6)
    start = save_kohya(replace(adapter, layers={PATH: large}), tmp_path / "a.safetensors")
    assert main(["convert", str(start), str(tmp_path / "out"), "--to", "peft", "--dtype", "fp16", "--lossy"]) == 2
    assert f"layer '{PATH}' has numbers above 65504" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layers_that_a_form_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = small()
    layers = {**adapter.layers, "unet.extra.to_q": adapter.layers[PATH]}
    Adapter(config=config_of(layers), layers=layers).save(tmp_path / "p")
    line = ["convert", str(tmp_path / "p"), str(tmp_path / "a.safetensors"), "--to", "kohya"]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "kohya can't hold layer 'unet.extra.to_q': kohya's name of it isn't known" in error and "--lossy leaves" in error
    assert not (tmp_path / "a.safetensors").exists()
    assert main([*line, "--lossy"]) == 0
    text = capsys.readouterr().out
    assert "left out: unet.extra.to_q" in text
    assert "relative error 0.71 over all layers, at most 1 (unet.extra.to_q)" in text  # one of two equal changes: √½


def test_what_lossy_does_not_allow(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["convert", str(adapter_folder), str(tmp_path / "a.safetensors"), "--to", "kohya", "--lossy"]
    assert main(line) == 2
    assert "belongs to no component" in (error := capsys.readouterr().err) and "--component unet" in error
    mixed = {PATH: small(magnitude=torch.ones(8)).layers[PATH], PATH.replace("to_q", "to_k"): small().layers[PATH]}
    start = save_kohya(Adapter(config=config_of(mixed), layers=mixed), tmp_path / "m.safetensors")
    assert main(["convert", str(start), str(tmp_path / "p"), "--to", "peft"]) == 2
    assert "other layers are decomposed (DoRA) and it isn't" in capsys.readouterr().err


def loha(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"hada_w1_a": rand(12, 3), "hada_w1_b": rand(3, 16), "hada_w2_a": rand(12, 3), "hada_w2_b": rand(3, 16)}
    said = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "loha"}), "ss_epoch": "3"}
    save_file({f"{NAME}.{key}": value for key, value in tensors.items()}, path, said)
    return path


@pytest.mark.filterwarnings("error")
def test_loha_by_svd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = loha(tmp_path / "loha.safetensors")
    assert main(["convert", str(start), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    text = capsys.readouterr().out
    assert "LoHa: 1 layer became LoRA of rank 9 to 9; largest relative error" in text
    assert "metadata kept: ss_epoch\nmetadata left out: ss_network_args\n" in text
    line = ["convert", str(start), str(tmp_path / "k.safetensors"), "--to", "kohya", "--rank", "4"]
    assert main(line) == 2
    assert f"1 layer would lose a part of their change, '{PATH}' 0." in capsys.readouterr().err
    assert main([*line, "--lossy"]) == 0
    assert "of rank 4 to 4; largest relative error 0." in capsys.readouterr().out
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert file.metadata() == {
            "ss_epoch": "3",
            "ss_network_alpha": "4",
            "ss_network_dim": "4",
            "ss_network_module": "networks.lora",
        }


def test_a_component_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's side is an adapter of one model: what PEFT itself reads and writes."""
    from peft import PeftModel

    adapter = adapter_for("sd", even=True)
    start = save_kohya(adapter, tmp_path / "a.safetensors")
    assert main(["convert", str(start), str(tmp_path / "unet"), "--to", "peft", "--component", "unet"]) == 0
    pipe = sd()
    model = PeftModel.from_pretrained(pipe.unet, str(tmp_path / "unet"))
    factor = model.get_submodule("base_model.model.mid_block.attentions.0.proj_in.lora_A.default").get_parameter("weight")
    assert torch.equal(factor, adapter.layers["unet.mid_block.attentions.0.proj_in"].A)
    assert main(["convert", str(tmp_path / "unet"), str(tmp_path / "b.safetensors"), "--to", "kohya", "--component", "unet"]) == 0
    again = Adapter.load(tmp_path / "b.safetensors")
    assert again.layers.keys() == {path for path in adapter.layers if path.startswith("unet.")}
    capsys.readouterr()
    assert main(["convert", str(start), str(tmp_path / "x"), "--to", "peft", "--component", "transformer"]) == 2
    assert "component 'transformer': the adapter has no layers of it" in capsys.readouterr().err


def test_a_component_is_only_taken_off_for_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().save(tmp_path / "p")
    assert main(["convert", str(tmp_path / "p"), str(tmp_path / "unet"), "--to", "peft", "--component", "unet"]) == 0
    assert list(Adapter.load(tmp_path / "unet").layers) == [PATH.removeprefix("unet.")]
    assert main(["convert", str(tmp_path / "unet"), str(tmp_path / "x"), "--to", "peft", "--component", "unet"]) == 2
    assert "--component unet: the paths of this adapter begin with no component" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_fingerprint_is_kept_with_the_paths_or_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = holder(sd())
    known = replace(adapter_for("sd", even=True), fingerprint=Fingerprint.of(pipe))
    start = save_kohya(known, tmp_path / "a.safetensors")
    assert main(["convert", str(start), str(tmp_path / "d"), "--to", "diffusers", "--component", "unet"]) == 0
    assert "fingerprint left out" not in capsys.readouterr().out
    assert Adapter.load(tmp_path / "d").fingerprint == known.fingerprint
    lb.attach(pipe).load("a", Adapter.load(tmp_path / "d"))
    assert main(["convert", str(start), str(tmp_path / "p"), "--to", "peft", "--component", "unet"]) == 0
    assert "fingerprint left out" in capsys.readouterr().out
    assert Adapter.load(tmp_path / "p").fingerprint is None


@pytest.mark.parametrize("trained", [True, False])
def test_rounded_magnitudes_are_not_exact(trained: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    magnitude = torch.linspace(1.0, 2.0, 8)
    layer = small(magnitude=magnitude).layers[PATH]
    A, B = layer.A.bfloat16().float(), layer.B.bfloat16().float() * trained  # so that only the magnitudes are rounded
    layers = {PATH: replace(layer, A=A, B=B)}
    start = save_kohya(Adapter(config=config_of(layers), layers=layers), tmp_path / "a.safetensors")
    line = ["convert", str(start), str(tmp_path / "p"), "--to", "peft", "--dtype", "bf16"]
    assert main(line) == 2
    assert "--lossy allows it" in capsys.readouterr().err
    assert main([*line, "--lossy"]) == 0
    off = float((magnitude - magnitude.bfloat16()).double().norm())
    assert off > 1e-3
    text = capsys.readouterr().out
    assert f"relative error 0 over all layers, at most {off / float(magnitude.norm()):.2g} ({PATH})" in text
    assert f"‖m − m'‖ of DoRA's magnitudes {off:.2g} beside ‖m‖ {float(magnitude.norm()):.3g}" in text


def test_names_by_a_pipelines_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = sd()
    for name in ("unet", "text_encoder"):
        part = getattr(pipe, name)
        if name == "unet":
            part.save_config(tmp_path / "pipe" / name)
        else:
            part.config.save_pretrained(tmp_path / "pipe" / name)
    (tmp_path / "pipe" / "model_index.json").write_text(
        json.dumps({"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"], "_x": 1})
    )
    start = save_kohya(adapter_of(holder(pipe)), tmp_path / "a.safetensors")
    assert main(["convert", str(start), str(tmp_path / "p"), "--to", "peft", "--model", str(tmp_path / "pipe")]) == 0
    assert "names: resolved by the model\n" in capsys.readouterr().out
    assert main(["convert", str(start), str(tmp_path / "q"), "--to", "peft"]) == 0
    assert "names: resolved by the written table, without a model\n" in capsys.readouterr().out
    assert Adapter.load(tmp_path / "p").layers.keys() == Adapter.load(tmp_path / "q").layers.keys()


def test_names_of_a_language_model(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lycoris_model_layers_0_self_attn_q_proj"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}, tmp_path / "a.safetensors"
    )
    line = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "p"), "--to", "peft"]
    assert main(line) == 2
    assert "can't be told from its name alone" in capsys.readouterr().err
    assert main([*line, "--model", str(base_folder)]) == 0
    assert list(Adapter.load(tmp_path / "p").layers) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--to", "kohya"], "its name ends in .safetensors"),
        (["x.safetensors", "--to", "peft"], "PEFT's form is a folder"),
        (["x", "--to", "peft", "--rank", "4"], "--rank is the rank of LoHa and LoKr layers, and it has none"),
        (["x", "--to", "peft", "--model", "nowhere"], "--model: nowhere is no folder here"),
        (["x", "--to", "ckpt"], "invalid choice: 'ckpt'"),
        (["x", "--to", "peft", "--losy"], "--losy: unknown flag (did you mean '--lossy'?)"),
        (["full", "--to", "peft"], "exists already and isn't empty. Choose another TARGET"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save_kohya(small(), tmp_path / "a.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["convert", "a.safetensors", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.safetensors", "full"]


def test_a_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "no.safetensors"), str(tmp_path / "x"), "--to", "peft"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
