"""Adapter GGUF, read back with the gguf library: names, shapes, order of rows, scaling; merged GGUF, read back as a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lorabank as lb
from lorabank.errors import AdapterFileError, ConfigError, FingerprintError, ModelError, OutputError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint, sampled
from lorabank.formats.gguf_adapter import places, write_adapter_gguf
from lorabank.formats.gguf_base import ARCHITECTURES, INTERLEAVED, check_base, interleaved, read_base
from lorabank.formats.gguf_experts import expert_places
from lorabank.merging.gguf import merge_gguf
from lorabank.models import load_base
from tests.models.conftest import tiny_llama
from tests.models.test_gguf import write_gguf

Q = "model.layers.0.self_attn.q_proj"
CONFIG = lb.AdapterConfig(rank=4, alpha=8, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 3.0})


def trained(config: lb.AdapterConfig = CONFIG, *, seed: int = 3, use_dora: bool = False) -> Adapter:
    """An adapter of the tiny Llama with B not zero, and magnitudes off their start."""
    bank = lb.attach(tiny_llama())
    bank.add("a", replace(config, use_dora=use_dora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.1 * noise) if parameter.ndim == 1 else 0.3 * noise)
    return bank.adapter("a")


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(file).tensors}


def uninterleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers' order again: written here the other way round than in the package."""
    size = len(rows) // heads
    order = [head * size + 2 * (i % (size // 2)) + i // (size // 2) for head in range(heads) for i in range(size)]
    return rows[order]


def test_metadata_and_names(base_folder: Path, tmp_path: Path) -> None:
    written = write_adapter_gguf(trained(), read_base(base_folder), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(written.file)
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["general.type"] == "adapter"
    assert found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 8.0 == written.alpha
    names = {tensor.name for tensor in reader.tensors}
    stems = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert names == {f"blk.{i}.{stem}.weight.lora_{role}" for i in range(2) for stem in stems for role in "ab"}
    assert written.tensors == len(names)


def test_the_change_is_the_same_with_one_alpha_for_all(base_folder: Path, tmp_path: Path) -> None:
    adapter, base = trained(), read_base(base_folder)
    file = write_adapter_gguf(adapter, base, tmp_path / "a.gguf").file
    found = tensors(file)
    for path, name in places(adapter, base).items():
        A, B = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        layer = adapter.layers[path]
        assert A.shape == layer.A.shape
        delta = 8.0 / B.shape[1] * (B @ A)  # what llama.cpp computes
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2])
        if heads:
            assert not torch.allclose(delta, layer.delta(), atol=1e-3)
            delta = uninterleaved(delta, heads)
        torch.testing.assert_close(delta, layer.delta(), rtol=1e-5, atol=1e-6)


def test_layers_of_the_common_scaling_are_not_touched(base_folder: Path, tmp_path: Path) -> None:
    adapter = trained()
    written = write_adapter_gguf(adapter, read_base(base_folder), tmp_path / "a.gguf")
    assert written.folded == 2  # both v_proj; down_proj has another rank and the same alpha
    found = tensors(written.file)["blk.1.ffn_up.weight.lora_b"]
    assert torch.equal(found, adapter.layers["model.layers.1.mlp.up_proj"].B)


def test_rslora_is_folded(base_folder: Path, tmp_path: Path) -> None:
    adapter = trained(lb.AdapterConfig(rank=4, alpha=6, use_rslora=True, targets=["v_proj"]))
    file = write_adapter_gguf(adapter, read_base(base_folder), tmp_path / "a.gguf").file
    alpha = gguf.GGUFReader(file).get_field("adapter.lora.alpha")
    assert alpha is not None
    assert alpha.contents() == pytest.approx(6 / math.sqrt(4) * 4)


def test_a_gguf_base_gives_the_same_file(base_folder: Path, base_file: Path, tmp_path: Path) -> None:
    adapter = trained()
    for base, name in ((base_folder, "a.gguf"), (base_file, "b.gguf")):
        write_adapter_gguf(adapter, read_base(base), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_half_precision_and_what_does_not_fit_in_it(base_folder: Path, tmp_path: Path) -> None:
    adapter, base = trained(), read_base(base_folder)
    file = write_adapter_gguf(adapter, base, tmp_path / "a.gguf", dtype="f16").file
    assert tensors(file)["blk.0.ffn_up.weight.lora_a"].dtype == torch.float16
    layers = {path: replace(layer, scaling=1e6 if path == Q else layer.scaling) for path, layer in adapter.layers.items()}
    with pytest.raises(AdapterFileError, match=r"which f16 can't.*--dtype f32"):
        write_adapter_gguf(replace(adapter, layers=layers), base, tmp_path / "b.gguf", dtype="f16")
    with pytest.raises(ConfigError, match=r"expected one of f32, f16, got 'f61' \(did you mean 'f16'\?\)"):
        write_adapter_gguf(adapter, base, tmp_path / "b.gguf", dtype="f61")
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_of_the_table(kind: str, tmp_path: Path) -> None:
    """Every linear layer of the blocks has a place of its shape; q's rows move where the table says so, and only there."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gpt2: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        sizes |= {"num_local_experts" if kind == "mixtral" else "num_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(gpt2 if kind == "gpt2" else sizes)))
    model.save_pretrained(tmp_path / "base")
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=2, alpha=2, exclude=["shared_expert_gate"] if kind == "qwen2_moe" else []))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_()
    adapter = bank.adapter("a")
    base = read_base(tmp_path / "base")
    found = tensors(write_adapter_gguf(adapter, base, tmp_path / "a.gguf").file)
    names = places(adapter, base)
    stacked = expert_places(adapter, base, where="a")
    plain = [path for path, layer in adapter.layers.items() if not layer.stack]
    assert len(found) == 2 * (len(plain) + len(stacked)) == 2 * (len(set(names.values())) + len(stacked))
    assert len(stacked) == (3 if len(plain) < len(adapter.layers) else 0)
    moved = {path for path, name in names.items() if not torch.equal(found[f"{name}.lora_b"], adapter.layers[path].B)}
    expected = {path for path in names if path.endswith(("q_proj", "k_proj"))} if base.architecture in INTERLEAVED else set()
    assert moved == expected


def test_interleaving_is_llama_cpps() -> None:
    rows = torch.arange(16)
    assert interleaved(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(uninterleaved(interleaved(rows, 2), 2), rows)


def test_an_embedding_is_looked_up_in(base_folder: Path, tmp_path: Path) -> None:
    layer = AdapterLayer(torch.randn(4, 261), torch.randn(32, 4), 2.0, looks_up=True)
    adapter = replace(trained(), layers={"model.embed_tokens": layer})
    found = tensors(write_adapter_gguf(adapter, read_base(base_folder), tmp_path / "a.gguf").file)
    assert torch.equal(found["token_embd.weight.lora_a"], layer.A.t())
    assert torch.equal(found["token_embd.weight.lora_b"], layer.B)


def test_an_embedding_that_is_the_head_too_is_refused(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "tied")
    base = read_base(tmp_path / "tied")
    embedding = AdapterLayer(torch.randn(4, 261), torch.randn(32, 4), 2.0, looks_up=True)
    head = AdapterLayer(torch.randn(4, 32), torch.randn(261, 4), 2.0)
    for path, layer, message in (
        ("model.embed_tokens", embedding, "also uses as its output head"),
        ("lm_head", head, r"no place.*its output head is its embedding"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            write_adapter_gguf(replace(trained(), layers={path: layer}), base, tmp_path / "a.gguf")


def test_a_layer_without_a_place_and_one_of_another_shape(base_folder: Path, tmp_path: Path) -> None:
    base, adapter = read_base(base_folder), trained()
    for path, layer, message in (
        ("model.layers.7.mlp.up_proj", adapter.layers["model.layers.0.mlp.up_proj"], r"no place in base 'tiny'.*2 blocks"),
        (Q, AdapterLayer(torch.ones(4, 48), torch.ones(48, 4), 1.0), r"changes a weight of \(48, 48\), and blk\.0\.attn_q"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            write_adapter_gguf(replace(adapter, layers={path: layer}), base, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*a.gguf*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"magnitude": torch.ones(32)}, r"llama\.cpp doesn't read DoRA.*--merged"),
        ({"A": torch.ones(4, 32, 3)}, "adapts no convolutions"),
        ({"A": torch.full((4, 32), float("nan"))}, "NaN or infinity"),
    ],
)
def test_what_llama_cpp_cannot_read(values: dict[str, Any], message: str, base_folder: Path, tmp_path: Path) -> None:
    adapter = trained()
    bad = replace(adapter, layers={**adapter.layers, Q: replace(adapter.layers[Q], **values)})
    with pytest.raises(AdapterFileError, match=message):
        write_adapter_gguf(bad, read_base(base_folder), tmp_path / "a.gguf")


def test_bases_that_are_not_known(tmp_path: Path, base_file: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_txt"}')
    with pytest.raises(ModelError, match=r"'gemma3_txt'.*did you mean 'gemma3_text'\?.*convert_hf_to_gguf"):
        read_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="has no num_attention_heads"):
        read_base(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"no config\.json with a model_type"):
        read_base(tmp_path)
    base_file.write_bytes(base_file.read_bytes()[:100])
    with pytest.raises(ModelError, match="no GGUF file that can be read"):
        read_base(base_file)
    write_gguf(tmp_path / "other.gguf", architecture="rwkv6")
    with pytest.raises(ModelError, match="'rwkv6' model isn't known"):
        read_base(tmp_path / "other.gguf")


def test_an_adapter_is_no_base(base_folder: Path, tmp_path: Path) -> None:
    file = write_adapter_gguf(trained(), read_base(base_folder), tmp_path / "a.gguf").file
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        read_base(file)


def test_nothing_is_left_where_it_cannot_be_written(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    (tmp_path / "a.gguf" / "kept").write_text("x")
    with pytest.raises(OutputError, match="can't be written"):
        write_adapter_gguf(trained(), read_base(base_folder), tmp_path / "a.gguf")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        write_adapter_gguf(trained(), read_base(base_folder), tmp_path / "file" / "b.gguf")
    assert {item.name for item in tmp_path.iterdir()} == {"a.gguf", "file", "tiny"}


def test_a_width_that_blocks_do_not_divide(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.gguf"
    writer = gguf.GGUFWriter(narrow, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((48, 48), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterFileError, match=r"blk\.0\.attn_q\.weight has rows of 48.*q8_0.*multiple of 32.*--dtype f16"):
        merge_gguf(narrow, None, tmp_path / "new" / "m.gguf", dtype="q8_0", all_tensors=True)
    assert {item.name for item in tmp_path.iterdir()} == {"narrow.gguf"}
    assert merge_gguf(narrow, None, tmp_path / "m.gguf", dtype="f16", all_tensors=True).file.is_file()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_merged_model_answers_as_base_and_adapter(use_dora: bool, base_file: Path, tmp_path: Path) -> None:
    adapter = trained(use_dora=use_dora)
    done = merge_gguf(base_file, adapter, tmp_path / "merged.gguf", dtype="f32")
    assert done.changed == 14
    assert done.lost_share < 1e-6
    model = tiny_llama()
    bank = lb.attach(model)
    bank.load("a", adapter)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), bank.route("a"):
        expected = model(ids).logits
    merged = load_base(str(done.file), cache=tmp_path / "cache", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - tiny_llama()(ids).logits).abs().max() > 0.1


def test_the_rest_of_the_file_is_copied_as_it_stands(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", quantized=True)
    adapter = trained(lb.AdapterConfig(rank=4, alpha=8, targets=["q_proj"]))
    done = merge_gguf(tmp_path / "base.gguf", adapter, tmp_path / "merged.gguf", dtype="f16")
    base, merged = (gguf.GGUFReader(tmp_path / name) for name in ("base.gguf", "merged.gguf"))
    assert (done.changed, done.copied) == (2, len(base.tensors) - 2)
    assert 0 < done.lost_share < 0.01
    for key, field in base.fields.items():
        if not key.startswith("GGUF."):
            assert merged.fields[key].contents() == field.contents(), key
    for old, new in zip(base.tensors, merged.tensors, strict=True):
        assert old.name == new.name
        changed = old.name.endswith("attn_q.weight")
        assert np.array_equal(old.data, new.data) != changed
        assert new.tensor_type.name == ("F16" if changed else old.tensor_type.name)


def test_a_quantised_base_is_unpacked(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", quantized=True)
    done = merge_gguf(tmp_path / "base.gguf", None, tmp_path / "f32.gguf", dtype="f32", all_tensors=True)
    old, new = (gguf.GGUFReader(path) for path in (tmp_path / "base.gguf", done.file))
    assert {tensor.tensor_type.name for tensor in new.tensors} == {"F32"}
    assert {tensor.tensor_type.name for tensor in old.tensors} == {"F32", "Q8_0"}
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert np.array_equal(gguf.quants.dequantize(before.data, before.tensor_type), after.data)


def test_gpt2_is_written_in_the_linear_maps_orientation(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    layer = AdapterLayer(torch.randn(2, 32), torch.randn(96, 2), 1.0)
    adapter = Adapter(config=CONFIG, layers={"transformer.h.0.attn.c_attn": layer})
    found = tensors(write_adapter_gguf(adapter, read_base(tmp_path / "base"), tmp_path / "a.gguf").file)
    assert torch.equal(found["blk.0.attn_qkv.weight.lora_a"], layer.A)
    assert torch.equal(found["blk.0.attn_qkv.weight.lora_b"], layer.B)


def test_a_gguf_of_another_model_of_the_same_shape(tmp_path: Path) -> None:
    norm = sampled(tiny_llama().get_parameter("model.norm.weight"), vocabulary=False)  # all alike here, so not among the chosen
    adapter = replace(trained(), fingerprint=Fingerprint(tensors={"model.norm.weight": norm}))
    write_gguf(tmp_path / "own.gguf", quantized=True)
    check_base(adapter, tmp_path / "own.gguf", where="a")
    (tmp_path / "other.gguf").write_bytes((tmp_path / "own.gguf").read_bytes())
    reader = gguf.GGUFReader(tmp_path / "other.gguf", "r+")
    (stored,) = (tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    stored.data[:] = stored.data * 1.5
    del reader, stored
    with pytest.raises(FingerprintError, match=r"a: the adapter was trained on another base than 'other\.gguf'.*norm.*--force"):
        check_base(adapter, tmp_path / "other.gguf", where="a")
    check_base(replace(adapter, fingerprint=None), tmp_path / "other.gguf", where="a")


def test_a_decomposed_embedding_is_merged(base_file: Path, tmp_path: Path) -> None:
    """A magnitude of each feature, whose norm is over the ids."""
    adapter = trained(lb.AdapterConfig(rank=3, targets=["embed_tokens", "q_proj"]), use_dora=True)
    done = merge_gguf(base_file, adapter, tmp_path / "merged.gguf", dtype="f32")
    plain = tiny_llama()
    bank = lb.attach(plain)
    bank.load("a", adapter)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), bank.route("a"):
        expected = plain(ids).logits
    merged = load_base(str(done.file), cache=tmp_path / "cache", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_decomposed_slices_leave_the_other_rows_of_a_quantised_weight(tmp_path: Path) -> None:
    """Whose norms aren't those of the base that the adapter was trained on."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight").detach().t().contiguous()
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gpt2")
    writer.add_block_count(1)
    writer.add_head_count(4)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_qkv.weight", gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=2, targets=["q", "v"], use_dora=True))
    with torch.no_grad():
        for key, p in bank.named_parameters("a"):
            p.copy_(1.5 * p if key.endswith("magnitude") else 0.3 * torch.randn(p.shape))
    adapter = replace(bank.adapter("a"), fingerprint=None)
    merged = tensors(merge_gguf(tmp_path / "base.gguf", adapter, tmp_path / "m.gguf", dtype="f32").file)["blk.0.attn_qkv.weight"]
    (stored,) = gguf.GGUFReader(tmp_path / "base.gguf").tensors
    before = torch.from_numpy(np.array(gguf.quants.dequantize(stored.data, kind)))
    merged = merged.view(torch.float32).view(before.shape)
    assert torch.equal(merged[32:64], before[32:64])
    for name, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
        layer = adapter.layers[f"transformer.h.0.attn.c_attn.{name}"]
        assert layer.magnitude is not None
        V = before[rows] + layer.delta()
        torch.testing.assert_close(merged[rows], (layer.magnitude / V.norm(dim=1))[:, None] * V)
