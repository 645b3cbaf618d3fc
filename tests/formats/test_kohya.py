"""kohya's files, both ways: names, the same picture in diffusers, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorabank import Adapter, attach
from lorabank.errors import AdapterFileError, FingerprintError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.components import as_component, config_of, of_component, spelled_for
from lorabank.formats.difference import difference
from lorabank.formats.kohya import load_kohya, read_kohya, save_kohya
from lorabank.formats.kohya_names import Naming, _entries, name_of, place
from tests.formats.pipelines import ATTENTION, CLIP, CONV, PIPELINES, adapter_for, adapter_of, decomposed, holder, picture
from tests.formats.test_diffusers import with_bank, with_diffusers


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\..*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"diffusers\..*")
        yield


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


# names ----------------------------------------------------------------------------------------------------------------

NAMES = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "lora_unet_mid_block_resnets_1_time_emb_proj": "unet.mid_block.resnets.1.time_emb_proj",
    "lora_unet_up_blocks_2_upsamplers_0_conv": "unet.up_blocks.2.upsamplers.0.conv",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    ),
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_input_blocks_6_0_op": "unet.down_blocks.1.downsamplers.0.conv",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_middle_block_2_0_out_layers_3": None,
    "lora_unet_middle_block_2_out_layers_3": "unet.mid_block.resnets.1.conv2",
    "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_2": "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
    "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "lora_unet_output_blocks_7_0_skip_connection": "unet.up_blocks.2.resnets.1.conv_shortcut",
    "lora_unet_output_blocks_2_1_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_time_embed_2": "unet.time_embedding.linear_2",
    "lora_unet_label_emb_0_0": "unet.add_embedding.linear_1",
    "lora_unet_out_2": "unet.conv_out",
    "lora_te_text_model_encoder_layers_11_self_attn_out_proj": "text_encoder.encoder.layers.11.self_attn.out_proj",
    "lora_te1_text_model_encoder_layers_3_mlp_fc2": "text_encoder.encoder.layers.3.mlp.fc2",
    "lora_te2_text_model_encoder_layers_3_mlp_fc2": "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
    "lora_te3_encoder_block_5_layer_1_DenseReluDense_wi_0": "text_encoder_2.encoder.block.5.layer.1.DenseReluDense.wi_0",
    "lora_unet_single_blocks_7_modulation_lin": "transformer.single_transformer_blocks.7.norm.linear",
    "lora_unet_guidance_in_in_layer": "transformer.time_text_embed.guidance_embedder.linear_1",
    "lora_transformer_transformer_blocks_3_attn_add_k_proj": "transformer.transformer_blocks.3.attn.add_k_proj",
    "lora_unet_down_blocks_0_attention_0_proj_in": None,
}


@pytest.mark.parametrize(("name", "path"), NAMES.items())
def test_names_without_a_model(name: str, path: str | None) -> None:
    found = place(name)
    assert (found.paths[0] if found else None) == path


def test_no_two_layers_of_the_table_have_one_name() -> None:
    meant: dict[str, tuple[str, ...]] = {}
    for prefix, _, original, paths, _ in _entries():
        for number in ("0", "7"):
            name = (prefix + original.replace(".", "_")).replace("{}", number)
            where = tuple(path.replace("{}", number) for path in paths)
            assert meant.setdefault(name, where) == where, name
    assert len(meant) > 700


@pytest.mark.parametrize("naming", [Naming(), Naming(unet="sgm", text="te1")], ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_names_are_read_back_for_every_layer_of_a_model(name: str, naming: Naming) -> None:
    for path in adapter_for(name, (*ATTENTION, *CONV, "linear_1", "fc2", "conv_in")).layers:
        found = name_of(path, naming)
        assert found is not None, path
        again = place(found[0])
        assert again is not None and path in again.paths


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL"])
def test_names_of_whole_models_are_read_as_diffusers_reads_them(name: str) -> None:
    """Every layer of the published architectures' U-Nets, against diffusers' own renaming."""
    sdxl = name == "SDXL"
    widths = (320, 640, 1280) if sdxl else (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            down_block_types=(
                ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2) if sdxl else (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
            ),
            up_block_types=((*("CrossAttnUpBlock2D",) * 2, "UpBlock2D") if sdxl else ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)),
            cross_attention_dim=2048 if sdxl else 1024 if name == "SD 2.1" else 768,
            use_linear_projection=name != "SD 1.5",
            transformer_layers_per_block=(1, 2, 10) if sdxl else 1,
            addition_embed_type="text_time" if sdxl else None,
            addition_time_embed_dim=256 if sdxl else None,
            projection_class_embeddings_input_dim=2816 if sdxl else None,
        )
    paths = [f"unet.{path}" for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    named = {path: found[0] for path in paths if (found := name_of(path, Naming(unet="sgm" if sdxl else "diffusers")))}
    assert set(paths) == set(named)
    state = {f"{one}.{role}.weight": torch.zeros(1, 1) for one in named.values() for role in ("lora_down", "lora_up")}
    pipeline: Any = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    theirs = convert_unet_state_dict_to_peft(pipeline.lora_state_dict(state, unet_config=unet.config)[0])
    assert {key.removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key} == set(paths)
    assert [place(one).paths for one in named.values()] == [(path,) for path in named]  # type: ignore[union-attr]


def test_paths_are_spelled_as_a_model_has_them() -> None:
    """`text_model.` is there or not, by the class and transformers' version."""
    old, new = "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.encoder.layers.0.mlp.fc1"
    layer = AdapterLayer(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    for has, lacks in ((old, new), (new, old)):
        adapter = Adapter(config=config_of({lacks: layer}), layers={lacks: layer})
        assert list(spelled_for(adapter, [has]).layers) == [has]
        assert spelled_for(adapter, [lacks, has]) is adapter
        assert spelled_for(adapter, ["unet.conv_in"]) is adapter


def test_the_naming_is_that_of_kohyas_own_files() -> None:
    def keys(name: str) -> str:
        adapter = adapter_for(name, ATTENTION)
        return " ".join(found[0] for path in adapter.layers if (found := name_of(path, Naming.of(list(adapter.layers)))))

    assert "lora_unet_mid_block_attentions_0_proj_in" in keys("sd") and "lora_te_text_model" in keys("sd")
    assert "lora_unet_middle_block_1_proj_in" in keys("sdxl") and "lora_te1_text_model" in keys("sdxl")
    assert "lora_unet_double_blocks_0_img_attn_qkv" in keys("flux") and "lora_te1_text_model" in keys("flux")


# diffusers reads ours, we read what diffusers reads -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_our_file_in_diffusers_gives_the_same_picture(name: str, tmp_path: Path) -> None:
    """One rank and α: how diffusers reads alphas that differ between attention layers isn't kohya's way.

    Of Flux it leaves the last layer out, and takes the fused matrix of a single block to be as large as FLUX.1's.
    """
    leaves = (*CLIP, "to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in")
    leaves += ("norm1.linear", "norm.linear", "0.proj_out") if name == "flux" else CONV
    adapter = adapter_for(name, leaves, even=True)
    keep = {path: layer for path, layer in adapter.layers.items() if "single_transformer_blocks.0.attn" not in path}
    adapter = replace(adapter, config=config_of(keep), layers=keep)
    path = save_kohya(adapter, tmp_path / "a.safetensors")
    ours, theirs = with_bank(name, load_kohya(path)), with_diffusers(name, path)
    assert float((theirs - picture(PIPELINES[name]())).abs().max()) > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_file_gives_the_adapter_back(name: str, tmp_path: Path) -> None:
    """Ranks, scalings, convolutions; where layers of one matrix have other scalings the change is equal to rounding."""
    adapter = adapter_for(name)
    again = load_kohya(save_kohya(adapter, tmp_path / "a.safetensors"))
    assert again.layers.keys() == adapter.layers.keys()
    assert difference(adapter.layers, again.layers).worst < 1e-6
    if name != "flux":
        assert difference(adapter.layers, again.layers).worst == 0
        assert {path: layer.scaling for path, layer in again.layers.items()} == {
            path: layer.scaling for path, layer in adapter.layers.items()
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_save_load_save_gives_identical_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = adapter_for(name).to(dtype=dtype)
    adapter = replace(adapter, base_model="some/base", metadata={"peft.revision": '"main"', "safetensors.ss_epoch": "3"})
    first = save_kohya(adapter, tmp_path / "a.safetensors")
    again = load_kohya(first)
    assert {layer.A.dtype for layer in again.layers.values()} == {dtype}
    assert (again.base_model, again.metadata["safetensors.ss_epoch"]) == ("some/base", "3")
    second = save_kohya(again, tmp_path / "b.safetensors")
    assert second.read_bytes() == first.read_bytes()


def test_alpha_without_an_exact_float32_is_kept(tmp_path: Path) -> None:
    layer = AdapterLayer(torch.ones(3, 4), torch.ones(4, 3), 7 / math.sqrt(3))  # rsLoRA's
    path = "text_encoder.encoder.layers.0.mlp.fc1"
    adapter = Adapter(config=config_of({path: layer}), layers={path: layer})
    saved = save_kohya(adapter, tmp_path / "a.safetensors")
    assert load_kohya(saved).layers[path].scaling == pytest.approx(layer.scaling, rel=1e-15)
    assert float(load_file(saved)["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]) == pytest.approx(7 * math.sqrt(3))


# fused matrices -----------------------------------------------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]


def test_a_fused_matrix_is_taken_apart_exactly(tmp_path: Path) -> None:
    A, B = torch.randn(4, 8), torch.randn(24, 4)
    path = write(
        tmp_path / "a.safetensors", {f"{QKV}.lora_down.weight": A, f"{QKV}.lora_up.weight": B, f"{QKV}.alpha": torch.tensor(2.0)}
    )
    adapter = load_kohya(path)
    assert list(adapter.layers) == sorted(PARTS)
    whole = torch.cat([adapter.layers[part].delta() for part in PARTS])
    assert torch.equal(whole, 0.5 * (B @ A))
    again = load_file(save_kohya(adapter, tmp_path / "b.safetensors"))
    assert torch.equal(again[f"{QKV}.lora_up.weight"], B) and torch.equal(again[f"{QKV}.lora_down.weight"], A)


def test_parts_of_their_own_ranks_keep_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {
        path: AdapterLayer(torch.randn(rank, 8), torch.randn(8, rank), 0.5) for path, rank in zip(PARTS, (2, 3, 1), strict=True)
    }
    for chosen in (PARTS, PARTS[1:], PARTS[:1]):
        some = {path: layers[path] for path in chosen}
        adapter = Adapter(config=config_of(some), layers=some)
        again = load_kohya(save_kohya(adapter, tmp_path / "a.safetensors")).layers
        assert again.keys() == some.keys()
        assert all(torch.equal(again[path].A, some[path].A) and torch.equal(again[path].B, some[path].B) for path in some)
        assert {layer.scaling for layer in again.values()} == {0.5}


def test_a_single_block_is_divided_by_its_width(tmp_path: Path) -> None:
    name = "lora_unet_single_blocks_0_linear1"
    path = write(
        tmp_path / "a.safetensors",
        {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8 * 3 + 32, 2)},
    )
    layers = load_kohya(path).layers
    assert {name.rpartition("transformer_blocks.0.")[2]: layer.size for name, layer in layers.items()} == {
        "attn.to_q": (8, 8),
        "attn.to_k": (8, 8),
        "attn.to_v": (8, 8),
        "proj_mlp": (8, 32),
    }
    write(path, {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(20, 2)})
    with pytest.raises(AdapterFileError, match="whose 20 rows can't be divided"):
        load_kohya(path)


def test_the_last_layers_halves_change_places(tmp_path: Path) -> None:
    name = "lora_unet_final_layer_adaLN_modulation_1"
    B = torch.randn(16, 2)
    path = write(tmp_path / "a.safetensors", {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": B})
    layer = load_kohya(path).layers["transformer.norm_out.linear"]
    assert torch.equal(layer.B, torch.cat([B[8:], B[:8]]))
    assert torch.equal(load_file(save_kohya(load_kohya(path), tmp_path / "b.safetensors"))[f"{name}.lora_up.weight"], B)


# DoRA -------------------------------------------------------------------------------------------------------------------


def test_dora(tmp_path: Path) -> None:
    model = holder(PIPELINES["sd"]())
    adapter = decomposed(adapter_of(model), model)
    path = save_kohya(adapter, tmp_path / "a.safetensors")
    shapes = {value.ndim for name, value in load_file(path).items() if name.endswith(".dora_scale")}
    assert shapes == {2, 4}  # (out, 1) and (out, 1, 1, 1), as LyCORIS has them
    again = load_kohya(path)
    assert all(torch.equal(again.layers[name].magnitude, layer.magnitude) for name, layer in adapter.layers.items())
    assert again.config.use_dora
    torch.testing.assert_close(with_bank("sd", again), with_bank("sd", adapter), rtol=0, atol=0)


def test_magnitudes_of_a_fused_matrix_go_with_their_rows(tmp_path: Path) -> None:
    tensors = {f"{QKV}.lora_down.weight": torch.randn(4, 8), f"{QKV}.lora_up.weight": torch.randn(24, 4)}
    tensors[f"{QKV}.dora_scale"] = torch.arange(1.0, 25.0)[:, None]
    adapter = load_kohya(write(tmp_path / "a.safetensors", tensors))
    assert torch.equal(torch.cat([adapter.layers[part].magnitude for part in PARTS]), torch.arange(1.0, 25.0))  # type: ignore[misc]
    again = load_file(save_kohya(adapter, tmp_path / "b.safetensors"))
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_magnitudes_of_inputs_are_refused(tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    good = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(AdapterFileError, match=r"a magnitude for each input \(LyCORIS' wd_on_output=False\)"):
        load_kohya(write(tmp_path / "a.safetensors", {**good, f"{name}.dora_scale": torch.ones(1, 4)}))
    with pytest.raises(AdapterFileError, match="one number for each of 4 outputs"):
        load_kohya(write(tmp_path / "a.safetensors", {**good, f"{name}.dora_scale": torch.ones(3, 1)}))
    assert load_kohya(write(tmp_path / "a.safetensors", {**good, f"{name}.dora_scale": torch.ones(4, 1)})).config.use_dora


# with a model -------------------------------------------------------------------------------------------------------------


def test_a_model_resolves_what_the_table_does_not(tmp_path: Path) -> None:
    name = "lycoris_model_layers_0_self_attn_q_proj"
    path = write(
        tmp_path / "a.safetensors", {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    )
    with pytest.raises(AdapterFileError, match=rf"which module '{name}' is can't be told.*--model"):
        Adapter.load(path)
    found = read_kohya(path, model=nested("model.layers.0.self_attn.q_proj"))
    assert list(found.adapter.layers) == ["model.layers.0.self_attn.q_proj"]
    assert (found.resolved, read_kohya(saved_for_sd(tmp_path)).resolved) == ("model", "table")
    with pytest.raises(AdapterFileError, match="the model has no layer 'lycoris_model_layers_0_self_attn_q_proj'"):
        read_kohya(path, model=nested("model.layers.0.self_attn.k_proj"))
    with pytest.raises(AdapterFileError, match="has no layer"):  # two modules give the name, so it's neither's
        read_kohya(path, model=nested("model.layers.0.self_attn.q_proj", "model.layers_0.self_attn.q_proj"))


def nested(*paths: str) -> nn.Module:
    """Linear layers 4 → 4 at these paths."""
    root = nn.Module()
    for path in paths:
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, nn.Linear(4, 4, device="meta"))
    return root


def saved_for_sd(folder: Path) -> Path:
    return save_kohya(adapter_for("sd"), folder / "sd.safetensors")


def test_a_model_and_the_table_agree(tmp_path: Path) -> None:
    for name, build in PIPELINES.items():
        model = holder(build())
        path = save_kohya(adapter_of(model), tmp_path / f"{name}.safetensors")
        by_model = read_kohya(path, model=model)
        assert by_model.adapter.layers.keys() == load_kohya(path).layers.keys()


def test_one_model_of_a_pipeline_gets_its_own_paths(tmp_path: Path) -> None:
    """The original names of SDXL too: a file of a U-Net alone goes into a bank of the U-Net."""
    pipe = PIPELINES["sdxl"]()
    adapter = as_component(of_component(adapter_of(holder(pipe)), "unet"), "unet")
    path = save_kohya(adapter, tmp_path / "a.safetensors")
    assert any("input_blocks" in key for key in load_file(path))
    found = read_kohya(path, model=pipe.unet).adapter
    assert found.layers.keys() == {name.removeprefix("unet.") for name in adapter.layers}
    attach(pipe.unet).load("a", found)


def test_from_a_bank_and_back(tmp_path: Path) -> None:
    """What a bank holds keeps its base's fingerprint in a file of kohya's."""
    bank = attach(holder(PIPELINES["sd"]()))
    bank.load("a", adapter_of(bank.model))
    again = load_kohya(save_kohya(bank.adapter("a"), tmp_path / "a.safetensors"))
    bank.load("b", again)
    other = holder(PIPELINES["sd"]())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1
    with pytest.raises(FingerprintError, match="another base model"):
        attach(other).load("a", again)


@pytest.mark.parametrize("width", [768, 1024])
def test_proj_in_of_sd_1_is_a_convolution(width: int, tmp_path: Path) -> None:
    """A LoHa's shapes are flat; the width of the text, or the model, tells whether the layer is a 1 × 1 convolution."""
    block = "lora_unet_mid_block_attentions_0_"
    flat = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 6), "hada_w2_a": (6, 2), "hada_w2_b": (2, 6)}
    text = {"lora_down.weight": (2, width), "lora_up.weight": (6, 2)}
    tensors = {f"{block}proj_in.{key}": torch.ones(size) for key, size in flat.items()}
    tensors |= {f"{block}transformer_blocks_0_attn2_to_k.{key}": torch.ones(size) for key, size in text.items()}
    layer = read_kohya(write(tmp_path / "a.safetensors", tensors)).adapter.layers["unet.mid_block.attentions.0.proj_in"]
    assert layer.A.shape[1:] == ((6, 1, 1) if width == 768 else (6,))


def test_a_text_encoders_layers_without_one(tmp_path: Path) -> None:
    path, model = saved_for_sd(tmp_path), holder(PIPELINES["sd"]())
    del model.text_encoder
    with pytest.raises(AdapterFileError, match=r"10 of \d+ layers .'lora_te_text.* are of a text encoder, which the model lacks"):
        read_kohya(path, model=model)


# metadata and bad files ---------------------------------------------------------------------------------------------------


def test_metadata_is_kept_and_hashes_are_not(tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    said = {"ss_network_dim": "32", "modelspec.title": "T", "sshs_model_hash": "abc", "ss_tag_frequency": json.dumps({"a": 1})}
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    adapter = load_kohya(write(tmp_path / "a.safetensors", tensors, said))
    assert adapter.layers["text_encoder.encoder.layers.0.mlp.fc1"].scaling == 1.0  # no alpha: the rank
    with safe_open(save_kohya(adapter, tmp_path / "b.safetensors"), "pt") as file:
        kept = file.metadata()
    assert {key: kept.get(key) for key in said} == {**said, "sshs_model_hash": None}
    assert kept["ss_network_module"] == "networks.lora"


KEY = "lora_te_text_model_encoder_layers_0_mlp_fc1"
DOWN, UP = {f"{KEY}.lora_down.weight": torch.ones(2, 4)}, {f"{KEY}.lora_up.weight": torch.ones(4, 2)}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a layer without keys": ({**DOWN, **UP, f"{KEY[:-1]}2.alpha": torch.tensor(1.0)}, r"fc2' has .*alpha' and neither lora_down"),
    "half a layer": (DOWN, "and no lora_up.weight: the file is incomplete"),
    "a key without a layer": (
        {**DOWN, **UP, f"{KEY}.lora_dwon.weight": torch.ones(2, 4)},
        r"no layer in kohya's form \(did you mean",
    ),
    "NaN": ({**DOWN, f"{KEY}.lora_up.weight": torch.full((4, 2), torch.nan)}, "lora_up.weight' holds NaN or infinity"),
    "ranks": ({**DOWN, f"{KEY}.lora_up.weight": torch.ones(4, 3)}, r"of one rank: lora_down \(2, 4\), lora_up \(4, 3\)"),
    "dimensions": ({**DOWN, f"{KEY}.lora_up.weight": torch.ones(8)}, r"of one rank: lora_down \(2, 4\), lora_up \(8,\)"),
    "alpha": ({**DOWN, **UP, f"{KEY}.alpha": torch.tensor(-1.0)}, "alpha' is -1; expected a number above 0"),
    "alphas": ({**DOWN, **UP, f"{KEY}.alpha": torch.ones(2)}, "alpha' should be one number"),
    "a whole difference": ({**DOWN, **UP, f"{KEY[:-1]}2.diff": torch.ones(4, 4)}, "a whole weight difference"),
    "a norm": ({**DOWN, **UP, "lora_te_norm.w_norm": torch.ones(4)}, "a trained normalisation layer"),
    "an embedding": ({**DOWN, **UP, "bundle_emb.x.string_to_param.*": torch.ones(4)}, "an embedding that came along"),
    "integers": ({**DOWN, f"{KEY}.lora_up.weight": torch.ones(4, 2, dtype=torch.int8)}, "int8; expected float32"),
    "unknown module": (
        {**DOWN, **UP, "lora_unet_joint_blocks_0_x.lora_down.weight": torch.ones(2, 4)},
        "can't be told from its name",
    ),
    "two spellings": (
        {key.replace("lora_te_", prefix): value for prefix in ("lora_te_", "lora_te1_") for key, value in {**DOWN, **UP}.items()},
        "are both 'text_encoder.encoder.layers.0.mlp.fc1'",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(write(tmp_path / "x.safetensors", tensors))


def test_what_the_form_cannot_hold_is_named_before_anything_is_written(plain_adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"can't hold layer 'model\.layers.*belongs to no component.*Nothing was written"):
        save_kohya(plain_adapter, tmp_path / "a.safetensors")
    layer = AdapterLayer(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    for path, changed, why in (
        ("unet.joint.to_q", layer, "kohya's name of it isn't known"),
        ("unet.mid_block.resnets.0.time_emb_proj", replace(layer, scaling=-1.0), "its scaling is -1"),
        ("unet.conv_in", replace(layer, A=torch.ones(2, 2, 3, 3), groups=2), "a convolution in 2 groups"),
        (PARTS[0], replace(layer, magnitude=torch.ones(4)), "not all parts of the one matrix"),
    ):
        with pytest.raises(AdapterFileError, match=why):
            save_kohya(Adapter(config=config_of({path: layer}), layers={path: changed}), tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())
