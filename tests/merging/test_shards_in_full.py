"""Merging by shard what isn't A and B: modules in full, new heads, biases, rows, weights that were tied and aren't now."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lorabank.bank.attach import attach
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import MergeError, ModelError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.merging.merge import merge
from lorabank.merging.shards import merge_folder
from lorabank.merging.ties import untie
from tests.merging.conftest import gpt2, llama

MakeAdapter = Callable[..., Adapter]
IDS = torch.tensor([[3, 5, 9, 2], [7, 3, 1, 1]])
BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def trained(model: nn.Module, seed: int = 3, *, labels: int | None = None, **settings: Any) -> tuple[Adapter, nn.Module, Any]:
    """An adapter all of whose leaves moved, and the model with its bank."""
    bank = attach(model)
    config = AdapterConfig(**{"rank": 2, "targets": ["q", "v"], **settings})
    bank.add("a", config) if labels is None else bank.add("a", config, num_labels=labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in bank.parameters("a"):
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    return bank.adapter("a"), model, bank


def beside(model: nn.Module, bank: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad(), bank.route("a"):
        return model.eval()(**inputs).logits


def plain(kind: Any, folder: Path, **inputs: Tensor) -> Tensor:
    """Logits of the folder as plain transformers loads it, which must find every weight and no other."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(**inputs).logits


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "head and embedding": (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms": (llama, {"modules_to_save": ["norm"]}),
    "biases of layers": (gpt2, {"targets": ["c_attn"], "bias": "lora_only"}),
    "all biases and lora_B's": (gpt2, {"targets": ["c_fc"], "bias": "all", "lora_bias": True}),
    "rows of two tables": (llama, {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 3]}}),
    "rows of a tied table": (lambda: llama(tied=True), {"trainable_token_indices": [3, 5]}),
    "a tied pair's LoRA": (lambda: llama(tied=True), {"targets": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_merge_in_memory_bit_for_bit(case: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    make, settings = CASES[case]
    make().save_pretrained(tmp_path / "base", max_shard_size="8kB")
    adapter, model, bank = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **settings)
    strength = 1.0 if adapter.modules else 0.7
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype, strength=strength, say=None)
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype or torch.float32)
    other = merge(memory, adapter, strength=strength, say=None).report
    memory.save_pretrained(tmp_path / "memory")
    assert_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "memory"))
    assert report == other
    if dtype is None and strength == 1:
        expected = beside(model, bank, input_ids=IDS)
        torch.testing.assert_close(plain(AutoModelForCausalLM, tmp_path / "out", input_ids=IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shards", ["1GB", "20kB"])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_a_tied_head_is_never_lost(saved: list[str], shards: str, tmp_path: Path) -> None:
    """The two become two tensors, and the configuration says so."""
    llama(tied=True).save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert "lm_head.weight" not in tensors_in(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter, model, bank = trained(model, modules_to_save=saved)
    expected = beside(model, bank, input_ids=IDS)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    assert settings_of(tmp_path / "base")["tie_word_embeddings"] and not settings_of(tmp_path / "out")["tie_word_embeddings"]
    found = plain(AutoModelForCausalLM, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    held = tensors_in(tmp_path / "out")
    for path in ("lm_head", "model.embed_tokens"):
        own = adapter.modules.get(path, {}).get("weight", tensors_in(tmp_path / "base")["model.embed_tokens.weight"])
        assert torch.equal(held[f"{path}.weight"], own)
    if shards == "20kB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(held)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in held.values())


def test_copies_of_a_tied_weight_with_the_same_values_stay_tied(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    adapter, _, _ = trained(model, modules_to_save=["lm_head", "embed_tokens"])
    adapter = replace(adapter, modules=dict.fromkeys(adapter.modules, adapter.modules["lm_head"]))
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "base")
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merge(memory, adapter, say=None)
    memory.save_pretrained(tmp_path / "memory")
    assert_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "memory"))


def test_lora_of_one_end_of_a_tied_weight_parts_the_two(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    adapter, model, bank = trained(model, targets=["lm_head", "q"])
    expected = beside(model, bank, input_ids=IDS)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    found = plain(AutoModelForCausalLM, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_encoder_decoders(tmp_path: Path) -> None:
    """Bart's tables part by the configuration; T5's are one by its code, and Switch Transformers compute something else."""
    torch.manual_seed(0)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    small: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "decoder_start_token_id": 0}
    bart = BartForConditionalGeneration(
        BartConfig(**small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    )
    bart.eval().save_pretrained(tmp_path / "bart")
    adapter, model, bank = trained(bart, modules_to_save=["lm_head"])
    expected = beside(model, bank, **inputs)
    merge_folder(tmp_path / "bart", adapter, tmp_path / "out", say=None)
    found = plain(BartForConditionalGeneration, tmp_path / "out", **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    small |= {"d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    for kind, config, message in (
        (T5ForConditionalGeneration, T5Config(**small), "are one weight in a T5ForConditionalGeneration, whatever its conf"),
        (
            SwitchTransformersForConditionalGeneration,
            SwitchTransformersConfig(**small, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
            "a SwitchTransformersForConditionalGeneration computes something else",
        ),
    ):
        other = kind(config)
        other.save_pretrained(tmp_path / "base")
        adapter, _, _ = trained(other, modules_to_save=["lm_head"])
        refused(tmp_path / "base", adapter, MergeError, message)
        with pytest.raises(MergeError, match=message):
            untie(kind.from_pretrained(tmp_path / "base"), adapter)


@pytest.mark.parametrize("shards", ["1GB", "20kB"])
def test_pefts_classifier_over_a_language_model(shards: str, tmp_path: Path) -> None:
    """Five labels, which the base's configuration doesn't know of; its language-model head has no place any more."""
    base = llama()
    base.config.pad_token_id = 1
    base.save_pretrained(tmp_path / "base", max_shard_size=shards)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
    merge_folder(tmp_path / "base", Adapter.load(tmp_path / "adapter"), tmp_path / "out", say=None)
    found = plain(AutoModelForSequenceClassification, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    said = settings_of(tmp_path / "out")
    assert said["architectures"] == ["LlamaForSequenceClassification"] and len(said["id2label"]) == 5
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
@pytest.mark.parametrize("base", [BertModel, BertForSequenceClassification])
def test_a_classifier_of_other_labels(kind: Any, base: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base(BertConfig(**BERT, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})).save_pretrained(tmp_path / "base")
    adapter, model, bank = trained(kind.from_pretrained(tmp_path / "base").eval(), labels=3)
    expected = beside(model, bank, input_ids=IDS)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    auto = AutoModelForSequenceClassification if kind is BertForSequenceClassification else AutoModelForTokenClassification
    found = plain(auto, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected[..., :3], rtol=1e-4, atol=1e-5)
    assert settings_of(tmp_path / "out")["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_labels_that_are_as_many_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}))
    model.save_pretrained(tmp_path / "base")
    adapter, _, _ = trained(model)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_a_picture_classifier_that_the_folder_does_not_name(tmp_path: Path) -> None:
    """Such adapters have no task type: the class is the only one of the model's that has a head of that name."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    said = {**settings_of(tmp_path / "base"), "architectures": ["ViTModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    adapter, model, bank = trained(ViTForImageClassification.from_pretrained(tmp_path / "base").eval(), labels=4)
    pixels = torch.rand(2, 3, 8, 8)
    expected = beside(model, bank, pixel_values=pixels)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    assert settings_of(tmp_path / "out")["architectures"] == ["ViTForImageClassification"]
    found = plain(ViTForImageClassification, tmp_path / "out", pixel_values=pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_grew_by_added_tokens(tied: bool, tmp_path: Path) -> None:
    llama(tied=tied).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(67, mean_resizing=False)
    adapter, model, bank = trained(model, modules_to_save=["lm_head", "embed_tokens"])
    ids = torch.tensor([[3, 66, 64]])
    expected = beside(model, bank, input_ids=ids)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    assert settings_of(tmp_path / "out")["vocab_size"] == 67
    torch.testing.assert_close(plain(AutoModelForCausalLM, tmp_path / "out", input_ids=ids), expected, rtol=1e-4, atol=1e-5)
    alone = replace(adapter, modules={"model.embed_tokens": adapter.modules["model.embed_tokens"]})
    with pytest.raises(MergeError, match=r"lm_head\.weight is \(64, 32\) in model\.safetensors and \(67, 32\) in the merged"):
        merge_folder(tmp_path / "base", alone, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def refused(folder: Path, adapter: Adapter, error: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        merge_folder(folder, adapter, folder.parent / "no", **options)
    assert not (folder.parent / "no").exists()


def test_what_is_refused_by_name_leaves_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = llama()
    model.save_pretrained(base)
    adapter, _, _ = trained(model, modules_to_save=["lm_head"])
    head = adapter.modules["lm_head"]["weight"]
    for modules, message in (
        ({"lm_hed": {"weight": head}}, r"no module 'lm_hed'.*did you mean 'lm_head'"),
        ({"lm_head": {"weight": head[:9]}}, r"'weight' is \(9, 32\) in the adapter and \(64, 32\) in the model"),
        ({"lm_head": {"weight": head, "bias": head[0]}}, r"has no 'bias'; it belongs to another base"),
        ({"lm_head": {"weight": head * float("nan")}}, r"module 'lm_head' of the adapter holds NaN"),
    ):
        refused(base, replace(adapter, modules=modules, task_type="CAUSAL_LM"), MergeError, message)
    refused(base, adapter, MergeError, "trained in full, and is merged whole", strength=0.5)
    one = next(iter(adapter.layers))
    low = replace(adapter, modules={}, layers={one: replace(adapter.layers[one], lora_bias=torch.ones(32))})
    refused(base, low, MergeError, rf"{one} has no bias")


def test_rows_of_a_table_whose_tied_end_is_trained_in_full(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    adapter, _, _ = trained(model, trainable_token_indices=[3])
    both = replace(adapter, modules={"lm_head": {"weight": torch.ones(64, 32)}})
    refused(
        tmp_path / "base", both, MergeError, r"embed_tokens\.weight and lm_head\.weight are one weight, and the adapter has rows"
    )


def test_a_base_that_lacks_more_than_the_head(tmp_path: Path) -> None:
    """BERT's pooler isn't in a masked model's checkpoint, and PEFT doesn't save it: it was random in training."""
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    adapter, _, _ = trained(BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    message = r"lack 2 of the weights of BertForSequenceClassification \(bert\.pooler\.dense\.\S+, bert\.pooler\.dense\.\S+\)"
    refused(tmp_path / "base", adapter, ModelError, message)


def test_several_classes_that_would_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    adapter, _, _ = trained(BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    assert adapter.task_type == "SEQ_CLS"
    message = r"changes what BertModel hasn't got, and fits BertForSequenceClassification and BertForTokenClassification"
    refused(tmp_path / "base", replace(adapter, task_type=None), ModelError, message)


def test_the_class_that_peft_notes_decides(tmp_path: Path) -> None:
    """PEFT writes `auto_mapping` where it was told no task type."""
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    model = BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=3)
    settings = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    assert adapter.task_type is None
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
    found = plain(AutoModelForTokenClassification, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_several_layers_over_experts_that_are_stacked_at_load(tmp_path: Path) -> None:
    """RoBERTa's head is two layers; Mixtral's files hold each expert by itself, and the model a stack."""
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**BERT), add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    mixtral = MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2, pad_token_id=0)
    MixtralForCausalLM(mixtral).save_pretrained(tmp_path / "mixtral")
    for name, kind in (("roberta", RobertaForSequenceClassification), ("mixtral", MixtralForSequenceClassification)):
        adapter, model, bank = trained(kind.from_pretrained(tmp_path / name).eval(), labels=3)
        expected = beside(model, bank, input_ids=IDS)
        merge_folder(tmp_path / name, adapter, tmp_path / f"{name}-out", say=None)
        found = plain(AutoModelForSequenceClassification, tmp_path / f"{name}-out", input_ids=IDS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_head_is_added_to_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    """A language model's body alone, without its head: the adapter's takes the place."""
    model = llama()
    model.model.save_pretrained(tmp_path / "base")
    adapter, model, bank = trained(model, modules_to_save=["lm_head"])
    expected = beside(model, bank, input_ids=IDS)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    found = plain(AutoModelForCausalLM, tmp_path / "out", input_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    headless = replace(
        adapter, modules={}, layers={"model.layers.0.self_attn.q_proj": AdapterLayer(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    )
    refused(tmp_path / "base", headless, ModelError, r"lack 1 of the weights of LlamaForCausalLM \(lm_head\.weight\)")
