"""diffusers' files, both ways: the same picture from the pipeline with a file of ours and from our bank, and what it writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabank import Adapter, attach, merge
from lorabank.errors import AdapterFileError
from lorabank.formats.components import as_component, of_component
from lorabank.formats.diffusers import FILE, SETTINGS, load_diffusers, save_diffusers
from lorabank.formats.kohya import save_kohya
from tests.formats.pipelines import PIPELINES, adapter_for, adapter_of, decomposed, holder, picture


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\..*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"diffusers\..*")
        yield


def with_bank(name: str, adapter: Adapter) -> Tensor:
    """The picture with `adapter` in a bank over all of the pipeline's models."""
    pipe = PIPELINES[name]()
    bank = attach(holder(pipe))
    bank.load("a", adapter)
    with bank.route("a"):
        return picture(pipe)


def with_diffusers(name: str, path: Path) -> Tensor:
    pipe = PIPELINES[name]()
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    return picture(pipe)


@pytest.mark.parametrize("name", PIPELINES)
def test_our_file_in_diffusers_gives_the_same_picture(name: str, tmp_path: Path) -> None:
    adapter = adapter_for(name)
    path = save_diffusers(adapter, tmp_path)
    plain = picture(PIPELINES[name]())
    ours, theirs = with_bank(name, load_diffusers(path)), with_diffusers(name, path)
    assert float((theirs - plain).abs().max()) > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_merged_gives_the_same_picture(tmp_path: Path) -> None:
    """kohya's alphas that differ by layer, by way of diffusers' form: the way round what diffusers makes of them."""
    kohya = save_kohya(adapter_for("sd"), tmp_path / "a.safetensors")
    path = save_diffusers(Adapter.load(kohya), tmp_path)
    pipe = PIPELINES["sd"]()
    handle = merge(holder(pipe), Adapter.load(kohya))
    torch.testing.assert_close(picture(pipe), with_diffusers("sd", path), rtol=0, atol=1e-5)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):  # as docs/convert.md says of diffusers
        theirs = with_diffusers("sd", kohya)
    assert float((theirs - picture(pipe)).abs().max()) > 0.01
    handle.unmerge()
    assert torch.equal(picture(pipe), picture(PIPELINES["sd"]()))


def settings_in(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[SETTINGS])


@pytest.mark.parametrize("name", PIPELINES)
def test_what_diffusers_writes_is_read(name: str, tmp_path: Path) -> None:
    """PEFT's own adapters on each model, saved by the pipeline with and without its metadata."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = PIPELINES[name]()
    parts = {
        part: getattr(pipe, part) for part in ("unet", "transformer", "text_encoder") if getattr(pipe, part, None) is not None
    }
    saved: dict[str, Any] = {}
    for part, model in parts.items():
        targets = ["q_proj", "fc1"] if part == "text_encoder" else ["to_q", "to_out.0", "conv1", "norm.linear"]
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, lora_dropout=0.1, rank_pattern={targets[0]: 2}
        )
        model.add_adapter(config, adapter_name="a")
        model.eval()
        saved[part] = get_peft_model_state_dict(model, adapter_name="a")
    expected = picture(pipe)
    kinds = {
        "unet_lora_layers": saved.get("unet"),
        "transformer_lora_layers": saved.get("transformer"),
        "text_encoder_lora_layers": saved["text_encoder"],
    }
    layers = {key: value for key, value in kinds.items() if value is not None}
    metadata = {
        key.replace("_lora_layers", "_lora_adapter_metadata"): parts[key.removesuffix("_lora_layers")].peft_config["a"].to_dict()
        for key in layers
    }
    pipe.save_lora_weights(tmp_path, **layers, **metadata)
    adapter = Adapter.load(tmp_path / FILE)
    assert {layer.scaling for layer in adapter.layers.values()} <= {1.5, 3.0}
    torch.testing.assert_close(with_bank(name, adapter), expected, rtol=0, atol=1e-5)
    assert adapter.config.dropout == 0.1
    before, after = (settings_in(path) for path in (tmp_path / FILE, save_diffusers(adapter, tmp_path / "again")))
    for key, value in before.items():
        if key.rpartition(".")[2] in ("lora_alpha", "lora_dropout", "peft_type", "peft_version", "bias"):
            assert after[key] == value, key

    old = {"text_encoder_lora_layers": convert_state_dict_to_diffusers(saved["text_encoder"])}
    pipe.save_lora_weights(tmp_path / "old", **{**layers, **old})
    tensors = load_file(tmp_path / "old" / FILE)
    assert any("lora_linear_layer" in key for key in tensors)
    assert Adapter.load(tmp_path / "old").layers.keys() == adapter.layers.keys()
    assert {layer.scaling for layer in Adapter.load(tmp_path / "old").layers.values()} == {1.0}


def test_dora_in_diffusers(tmp_path: Path) -> None:
    model = holder(PIPELINES["sd"]())
    adapter = decomposed(adapter_of(model), model)
    path = save_diffusers(adapter, tmp_path)
    ours, theirs = with_bank("sd", load_diffusers(path)), with_diffusers("sd", path)
    assert float((ours - with_bank("sd", adapter_of(model))).abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_save_load_save_gives_identical_bytes(name: str, tmp_path: Path) -> None:
    adapter = adapter_for(name)
    adapter = Adapter(
        config=adapter.config,
        layers=adapter.layers,
        base_model="some/base",
        metadata={"safetensors.modelspec.title": "A title", "peft.revision": '"main"', "diffusers.unet": "{}"},
    )
    first = save_diffusers(adapter, tmp_path / "a")
    again = load_diffusers(first)
    assert again.config == adapter.config
    assert again.base_model == "some/base"
    assert again.metadata["safetensors.modelspec.title"] == "A title"
    assert save_diffusers(again, tmp_path / "b").read_bytes() == first.read_bytes()
    for path, layer in adapter.layers.items():
        assert torch.equal(again.layers[path].A, layer.A)
        assert again.layers[path].scaling == layer.scaling


def test_a_text_encoder_is_named_as_any_version_reads_it(tmp_path: Path) -> None:
    adapter = adapter_for("sdxl")
    keys = load_file(save_diffusers(adapter, tmp_path))
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in adapter.layers


def test_components_apart_and_together() -> None:
    adapter = adapter_for("sd")
    unet = of_component(adapter, "unet")
    assert "mid_block.attentions.0.proj_in" in unet.layers
    pipe = PIPELINES["sd"]()
    attach(pipe.unet).load("a", unet)
    assert as_component(unet, "unet").layers.keys() == {path for path in adapter.layers if path.startswith("unet.")}
    with pytest.raises(AdapterFileError, match=r"'text_encoder_2'.*did you mean 'text_encoder'"):
        of_component(adapter, "text_encoder_2")
    with pytest.raises(AdapterFileError, match=r"'uent': not known.*did you mean 'unet'"):
        as_component(unet, "uent")


def test_a_text_encoders_layers_without_one() -> None:
    """Named with the way out, and nothing is loaded."""
    model = holder(PIPELINES["sd"]())
    del model.text_encoder
    bank = attach(model)
    with pytest.raises(AdapterFileError, match=r"nothing was loaded.*the model has no text_encoder \(.*of_component"):
        bank.load("a", adapter_for("sd"))
    assert bank.names == ()
    bank.load("a", as_component(of_component(adapter_for("sd"), "unet"), "unet"))


PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = torch.ones(2, 4), torch.ones(4, 2)
GOOD = {f"{PATH}.lora_A.weight": A, f"{PATH}.lora_B.weight": B}
SAID = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}
BROKEN: dict[str, tuple[dict[str, Tensor], Any, str]] = {
    "no component": ({**GOOD, "vae.conv.lora_A.weight": A}, None, r"'vae.conv.lora_A.weight' belongs to no component"),
    "half a layer": ({f"{PATH}.lora_A.weight": A}, None, r"has .*lora_A.* and no lora_B"),
    "twice": ({**GOOD, f"{PATH}.lora.down.weight": A, f"{PATH}.lora.up.weight": B}, None, "there twice"),
    "NaN": ({**GOOD, f"{PATH}.lora_B.weight": B * torch.nan}, None, r"lora_B.weight' holds NaN"),
    "another rank": (GOOD, {**SAID, "unet.r": 3}, "has the rank 2, lora_adapter_metadata says 3"),
    "settings of no layer": (GOOD, {**SAID, "text_encoder.r": 2}, "settings of 'text_encoder' and the file no layers"),
    "no settings": ({**GOOD, "text_encoder.a.lora_A.weight": A, "text_encoder.a.lora_B.weight": B}, SAID, "no settings of"),
    "no JSON": (GOOD, "{", "no valid JSON"),
    "stray setting": (GOOD, {"r": 2}, "'r' belongs to no component"),
    "not LoRA": (GOOD, {**SAID, "unet.bias": "all"}, "bias = 'all'"),
    "magnitudes alone": ({**GOOD, "unet.b.lora_magnitude_vector": torch.ones(4)}, None, "'b' has DoRA's magnitudes and no"),
    "no magnitudes": (GOOD, {**SAID, "unet.use_dora": True}, "no lora_magnitude_vector"),
}


@pytest.mark.parametrize(("tensors", "settings", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named(tensors: dict[str, Tensor], settings: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file({key: value.clone() for key, value in tensors.items()}, path, {} if settings is None else {SETTINGS: text})
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(path)


def test_what_the_form_cannot_hold_is_named_before_anything_is_written(plain_adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"can't hold layer 'model\.layers.*belongs to no component.*Nothing was written"):
        save_diffusers(plain_adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_huge_changes_are_named(tmp_path: Path) -> None:
    save_file({**GOOD, f"{PATH}.lora_B.weight": B * 1e5}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=rf"1 of 1 layers change their weight by more than it is, '{PATH}'"):
        Adapter.load(tmp_path / "x.safetensors")
