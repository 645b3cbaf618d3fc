"""The folder for vLLM: one rank, a scaling of 1, the same change; what vLLM can't read is refused with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorabank as lb
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.readers import READERS, VLLM_RANKS, obstacles, refuse
from lorabank.formats.vllm import check_shapes, vllm_adapter, vllm_rank
from tests.bank.tiny import neox
from tests.formats.conftest import CONFIGS, GPT2_LEAVES, LLAMA_LEAVES, adapter_of, gpt2, llama

PATH = "model.layers.0.self_attn.q_proj"
OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"magnitude": torch.ones(32)}, r"vLLM doesn't read DoRA \(model\.layers.*merge it"),
    "convolution": ({"A": torch.ones(4, 32, 3)}, "vLLM adapts no convolutions"),
    "rank": ({"A": torch.ones(600, 32), "B": torch.ones(32, 600)}, "rank 600 is above vLLM's largest, 512"),
    "nan": ({"B": torch.full((32, 4), float("nan"))}, "NaN or infinity.*earlier checkpoint"),
    "infinity": ({"A": torch.full((4, 32), float("inf"))}, "NaN or infinity"),
    "embedding": ({"looks_up": True}, "vLLM adapts no embedding but 'embed_tokens'"),
}


def changed(adapter: Adapter, path: str = PATH, **values: Any) -> Adapter:
    layers = dict(adapter.layers)
    layers[path] = replace(layers[path], **values)
    return replace(adapter, layers=layers)


def test_scaling_is_folded_and_ranks_are_one(llama_case: tuple[Any, Adapter]) -> None:
    _, adapter = llama_case
    exported = vllm_adapter(adapter)
    largest = max(layer.rank for layer in adapter.layers.values())
    assert {layer.rank for layer in exported.layers.values()} == {8} == {vllm_rank(adapter)}
    assert largest <= 8
    assert {layer.scaling for layer in exported.layers.values()} == {1.0}
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(exported.layers[path].delta(), layer.delta(), rtol=1e-6, atol=1e-6)
        assert not exported.layers[path].A[layer.rank :].any()
        assert not exported.layers[path].B[:, layer.rank :].any()


def test_peft_reads_the_folder_and_gives_the_same_logits(llama_case: tuple[Any, Adapter], tmp_path: Path) -> None:
    model, adapter = llama_case
    ids = torch.arange(3, 40)[None]
    bank = lb.attach(model)
    bank.load("a", adapter)
    with torch.no_grad(), bank.route("a"):
        expected = model(ids).logits
    plain = bank.detach()
    folder = vllm_adapter(adapter).save(tmp_path / "vllm")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({}, {})
    assert not settings.get("use_rslora")
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, folder).eval()(ids).logits
        base = llama()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 0.01


def test_sixteen_bits_are_folded_in_thirty_two(plain_adapter: Adapter) -> None:
    half = plain_adapter.to(dtype=torch.bfloat16)
    layer = vllm_adapter(changed(half, scaling=1 / 3)).layers[PATH]
    assert layer.B.dtype == torch.float32
    expected = half.layers[PATH].B.float() * (1 / 3)
    torch.testing.assert_close(layer.B[:, :4], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_smallest_rank_that_vllm_takes(plain_adapter: Adapter, rank: int, padded: int) -> None:
    layers = {path: replace(layer, A=torch.ones(rank, 32), B=torch.ones(8, rank)) for path, layer in plain_adapter.layers.items()}
    exported = vllm_adapter(replace(plain_adapter, layers=layers))
    assert exported.config.rank == padded
    assert padded in VLLM_RANKS
    assert exported.layers[PATH].A.shape == (padded, 32)


@pytest.mark.parametrize(("values", "message"), OTHER_KINDS.values(), ids=OTHER_KINDS.keys())
def test_what_vllm_cannot_read_is_refused_with_the_way_out(plain_adapter: Adapter, values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        vllm_adapter(changed(plain_adapter, **values), where="out/formal")


def test_every_reason_is_named_at_once(plain_adapter: Adapter) -> None:
    bad = changed(changed(plain_adapter, magnitude=torch.ones(32)), path="model.layers.1.self_attn.q_proj", scaling=2.0)
    bad = changed(bad, path="model.layers.1.self_attn.v_proj", A=torch.ones(4, 32, 3))
    with pytest.raises(AdapterFileError, match=r"DoRA.*convolutions"):
        refuse(bad, "vllm")


def test_the_embedding_that_vllm_adapts(plain_adapter: Adapter) -> None:
    layer = AdapterLayer(torch.randn(4, 64), torch.randn(32, 4), 2.0, looks_up=True)
    exported = vllm_adapter(replace(plain_adapter, layers={**plain_adapter.layers, "model.embed_tokens": layer}))
    assert exported.layers["model.embed_tokens"].looks_up


def test_gpt2_is_refused() -> None:
    adapter = adapter_of(gpt2(), GPT2_LEAVES, CONFIGS["plain"], transposed=True)
    with pytest.raises(AdapterFileError, match="no adapters for GPT-2"):
        vllm_adapter(adapter)


def test_older_vllm_needs_the_export_where_layers_differ(plain_adapter: Adapter) -> None:
    assert obstacles(plain_adapter, "older vllm") == []
    mixed = changed(plain_adapter, scaling=0.5)
    assert [item.way_out for item in obstacles(mixed, "older vllm")] == ["lorabank export --to vllm folds and pads them"]
    assert obstacles(mixed, "vllm") == []
    assert obstacles(vllm_adapter(mixed), "older vllm") == []


@pytest.mark.filterwarnings("ignore:.*rank 17. is above what layer")
def test_slices_of_a_layer_are_one_layer_with_their_ranks_together() -> None:
    bank = lb.attach(neox())
    bank.add("a", lb.AdapterConfig(rank=170, targets=["q", "k", "query_key_value.v", "dense"]))
    adapter = bank.adapter("a")
    assert obstacles(adapter, "vllm") == []
    assert [item.way_out for item in obstacles(adapter, "older vllm")] == ["lorabank export --to vllm folds and pads them"]
    bank.add("b", lb.AdapterConfig(rank=171, targets=["q", "k", "query_key_value.v"]))
    with pytest.raises(AdapterFileError, match=r"rank 513 is above vLLM's largest, 512 \(gpt_neox\.\S+\.query_key_value, "):
        vllm_adapter(bank.adapter("b"))


def test_exact_combination_refuses_what_the_table_says(plain_adapter: Adapter) -> None:
    decomposed = changed(plain_adapter, magnitude=torch.ones(32))
    whole = replace(plain_adapter, modules={"lm_head": {"weight": torch.ones(48, 32)}})
    for adapter in (plain_adapter, decomposed, whole):
        if obstacles(adapter, "combine"):
            with pytest.raises(lb.LorabankError, match="DoRA"):
                lb.combine([(adapter, 1.0)])
        else:
            assert lb.combine([(adapter, 1.0)]).layers
    assert obstacles(decomposed, "combine")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_a_plain_adapter_and_refuses_nan(reader: str, plain_adapter: Adapter) -> None:
    assert obstacles(plain_adapter, reader) == []
    (first, *_) = obstacles(changed(plain_adapter, B=torch.full((32, 4), float("nan"))), reader)
    assert first.layers == (PATH,)
    assert "NaN" in str(first)


def test_shapes_of_another_model(plain_adapter: Adapter, make_llama: Callable[..., Any], tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "own")
    make_llama(hidden=64).save_pretrained(tmp_path / "other")
    check_shapes(plain_adapter, tmp_path / "own", where="x")
    with pytest.raises(AdapterFileError, match=r"changes a weight of \(32, 32\).*other is \(64, 64\).*another model"):
        check_shapes(adapter_of(llama(), LLAMA_LEAVES, CONFIGS["plain"]), tmp_path / "other", where="x")


def test_a_folder_without_the_layers(plain_adapter: Adapter, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "own")
    gpt2().save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    prefixed = replace(plain_adapter, layers={f"more.{path}": layer for path, layer in plain_adapter.layers.items()})
    check_shapes(prefixed, tmp_path / "own", where="x")
    with pytest.raises(AdapterFileError, match=r"x: none of its layers is in .*other, such as 'model\.layers\."):
        check_shapes(plain_adapter, tmp_path / "other", where="x")
    with pytest.raises(AdapterFileError, match=r"x: .*empty holds no model"):
        check_shapes(plain_adapter, tmp_path / "empty", where="x")


@pytest.mark.parametrize("reader", ["vllm", "older vllm", "gguf", "merged gguf"])
@pytest.mark.parametrize(
    "path",
    [
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "transformer.single_transformer_blocks.0.proj_out",
        "down_blocks.0.attentions.0.proj_in",
    ],
)
def test_language_models_readers_take_no_image_models(reader: str, path: str, plain_adapter: Adapter) -> None:
    layer = plain_adapter.layers[PATH]
    (found, *_) = obstacles(replace(plain_adapter, layers={path: layer}), reader)
    assert "has no image models" in found.what and found.layers == (path,)
    language = replace(
        plain_adapter, layers={"transformer.h.0.attn.c_attn": layer}
    )  # GPT-2's paths begin with a component's name
    assert not any("image" in found.what for found in obstacles(language, reader))


OLDER_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"magnitude": torch.ones(32)}, "DoRA from 0.9 on"),
    "DoRA on a Conv2d": ({"magnitude": torch.ones(32), "A": torch.ones(4, 8, 3, 3)}, "DoRA on convolutions from 0.10 on"),
    "Conv3d": ({"A": torch.ones(4, 8, 3, 3, 3)}, "Conv3d from 0.14 on"),
    "Conv1d": ({"A": torch.ones(4, 8, 3)}, "Conv1d from 0.15 on"),
}


@pytest.mark.parametrize(("values", "message"), OLDER_PEFT.values(), ids=OLDER_PEFT.keys())
def test_what_older_peft_refuses(plain_adapter: Adapter, values: dict[str, Any], message: str) -> None:
    (found,) = obstacles(changed(plain_adapter, **values), "older peft")
    assert message in found.what
    assert (found.layers, found.way_out) == ((PATH,), "update PEFT")


HEAD = {"weight": torch.ones(3, 32)}


@pytest.mark.parametrize(
    ("modules", "taken"),
    [(["score"], True), (["classifier"], True), (["lm_head"], False), (["model.score"], False), (["classifier", "score"], False)],
)
def test_one_classifiers_head_is_read_in_full(plain_adapter: Adapter, modules: list[str], taken: bool, tmp_path: Path) -> None:
    adapter = replace(plain_adapter, modules=dict.fromkeys(modules, HEAD))
    if not taken:
        with pytest.raises(AdapterFileError, match=rf"reads no modules that were trained in full.*{modules[0]}.*merge it"):
            vllm_adapter(adapter)
        assert not any("from 0.31 on" in item.what for item in obstacles(adapter, "older vllm"))  # an update wouldn't help
        return
    folder = vllm_adapter(adapter).save(tmp_path / "out")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == modules
    torch.testing.assert_close(Adapter.load(folder).modules[modules[0]]["weight"], HEAD["weight"])
    assert [item.what for item in obstacles(adapter, "older vllm")] == ["vLLM reads a head that was trained in full from 0.31 on"]


EMBEDDING = {"model.embed_tokens": AdapterLayer(torch.ones(4, 64), torch.ones(32, 4), 2.0, looks_up=True)}
OUTPUT_HEAD = {"lm_head": AdapterLayer(torch.ones(4, 32), torch.ones(64, 4), 2.0)}


@pytest.mark.parametrize(
    ("model_type", "layers", "message"),
    [
        ("qwen2", EMBEDDING, r"vLLM adapts no embedding of 'qwen2' models \(model\.embed_tokens\): merge it"),
        ("qwen2", OUTPUT_HEAD, r"vLLM adapts no output head of 'qwen2' models \(lm_head\): merge it"),
        ("cohere", OUTPUT_HEAD, "vLLM adapts no output head of 'cohere' models"),
        ("stablelm", {}, "vLLM takes no adapters for 'stablelm' models: merge it"),
        ("cohere", EMBEDDING, None),
        ("qwen2", {}, None),
        ("llama", EMBEDDING | OUTPUT_HEAD, None),
        (None, EMBEDDING | OUTPUT_HEAD, None),
        ("a family of tomorrow", EMBEDDING | OUTPUT_HEAD, None),
    ],
)
def test_what_vllm_does_not_adapt_of_a_family(
    plain_adapter: Adapter, model_type: str | None, layers: dict[str, AdapterLayer], message: str | None
) -> None:
    adapter = replace(plain_adapter, layers={**plain_adapter.layers, **layers})
    if message is None:
        assert vllm_adapter(adapter, model_type=model_type).layers.keys() == adapter.layers.keys()
        return
    with pytest.raises(AdapterFileError, match=message):
        vllm_adapter(adapter, model_type=model_type)
