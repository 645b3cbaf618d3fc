"""`lorabank merge` of adapters that aren't a language model's, or change more than A and B; in memory and by shard."""

from __future__ import annotations

import json
import shutil
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
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lorabank import quantize_base
from lorabank.bank.attach import attach
from lorabank.cli import main
from lorabank.config.adapter import AdapterConfig

IDS = torch.tensor([[3, 5, 9, 2], [7, 3, 1, 1]])
TEXT: dict[str, Any] = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
BERT: dict[str, Any] = {
    **TEXT,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
WAYS = pytest.mark.parametrize("way", [[], ["--by-shard"]], ids=["in memory", "by shard"])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def saved(model: Any, folder: Path, tokenizer: Path | None) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def trained(model: nn.Module, folder: Path, base: Path, *, labels: int | None = None, **settings: Any) -> Any:
    """Saves an adapter all of whose leaves moved; gives a bank that has it."""
    bank = attach(model.eval())
    config = AdapterConfig(**{"rank": 2, "targets": ["q", "v"], **settings})
    bank.add("a", config) if labels is None else bank.add("a", config, num_labels=labels)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for leaf in bank.parameters("a"):
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    replace(bank.adapter("a"), base_model=str(base)).save(folder)
    return bank


def beside(bank: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad(), bank.route("a"):
        return bank.model(**inputs).logits


def plain(kind: Any, folder: Path, **inputs: Tensor) -> Tensor:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(**inputs).logits


def merged(tmp_path: Path, way: list[str], *more: str) -> tuple[int, Path]:
    out = tmp_path / "merged"
    return main(["merge", str(tmp_path / "adapter"), *way, *more, "--device", "cpu", "--output", str(out)]), out


@WAYS
def test_pefts_classifier_over_a_language_model(
    way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForSequenceClassification.from_pretrained(base_folder, num_labels=5, pad_token_id=1)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    code, out = merged(tmp_path, way)
    assert code == 0
    said = capsys.readouterr().out
    assert "taken over in full: score\n" in said and "labels: 5, called LABEL_0" in said and "\nno pad_token_id: set" in said
    assert f"AutoModelForSequenceClassification.from_pretrained('{out}')" in said
    assert way or "on a sentence: merged and unmerged outputs differ by at most" in said
    with torch.no_grad():
        expected = wrapped(input_ids=IDS[:1]).logits
    found = plain(AutoModelForSequenceClassification, out, input_ids=IDS[:1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (base_folder / "tokenizer.json").read_bytes()


@WAYS
def test_both_ways_part_a_tied_head(
    way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoModelForCausalLM.from_pretrained(base_folder).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base = saved(LlamaForCausalLM(config), tmp_path / "base", base_folder)
    bank = trained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", base, modules_to_save=["lm_head"])
    code, out = merged(tmp_path, way)
    assert code == 0
    assert "the output head and the embedding are two weights now (tie_word_embeddings: false)" in capsys.readouterr().out
    held = tensors_in(out)
    assert torch.equal(held["lm_head.weight"], bank.adapter("a").modules["lm_head"]["weight"])
    assert torch.equal(held["model.embed_tokens.weight"], tensors_in(base)["model.embed_tokens.weight"])
    expected = beside(bank, input_ids=IDS)
    torch.testing.assert_close(plain(AutoModelForCausalLM, out, input_ids=IDS), expected, rtol=1e-4, atol=1e-5)


@WAYS
def test_an_untied_head_is_not_said_to_part(
    way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(LlamaForCausalLM.from_pretrained(base_folder), tmp_path / "adapter", base_folder, modules_to_save=["lm_head"])
    assert merged(tmp_path, way)[0] == 0
    said = capsys.readouterr().out
    assert (
        "taken over in full: lm_head\n" in said and "two weights" not in said and "labels" not in said and "tokens:" not in said
    )


@WAYS
@pytest.mark.parametrize("kind", ["masked", "encoder-decoder"])
def test_other_models_that_read_text(
    kind: str, way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": IDS}
    if kind == "masked":
        made, auto = BertForMaskedLM(BertConfig(**BERT)), AutoModelForMaskedLM
    else:
        small: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 32}
        small |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        made, auto = BartForConditionalGeneration(BartConfig(**TEXT, **small, decoder_start_token_id=0)), AutoModelForSeq2SeqLM
        inputs["decoder_input_ids"] = IDS
    base = saved(made, tmp_path / "base", base_folder)
    bank = trained(auto.from_pretrained(base), tmp_path / "adapter", base)
    code, out = merged(tmp_path, way)
    assert code == 0
    said = capsys.readouterr().out
    assert f"{auto.__name__}.from_pretrained('{out}')" in said
    assert way or "on a sentence: merged and unmerged outputs differ by at most" in said
    torch.testing.assert_close(plain(auto, out, **inputs), beside(bank, **inputs), rtol=1e-4, atol=1e-5)
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}


@WAYS
def test_a_picture_classifier(way: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    base = saved(ViTForImageClassification(config), tmp_path / "base", None)
    said = {**json.loads((base / "config.json").read_text()), "architectures": ["ViTModel"]}
    (base / "config.json").write_text(json.dumps(said))
    (base / "preprocessor_config.json").write_text("{}")
    bank = trained(ViTForImageClassification.from_pretrained(base), tmp_path / "adapter", base, labels=4)
    code, out = merged(tmp_path, way)
    assert code == 0
    told = capsys.readouterr().out
    assert "AutoModelForImageClassification.from_pretrained" in told and "labels: 4" in told
    assert way or "outputs weren't compared: the model reads more than a sentence" in told
    pixels = torch.rand(2, 3, 8, 8)
    found = plain(ViTForImageClassification, out, pixel_values=pixels)
    torch.testing.assert_close(found, beside(bank, pixel_values=pixels), rtol=1e-4, atol=1e-5)
    assert (out / "preprocessor_config.json").is_file()


@WAYS
def test_other_labels_than_the_bases_and_the_other_kind_of_classifier(way: list[str], tmp_path: Path) -> None:
    """The base's own head is of two labels; in token classification the adapter's is of three."""
    torch.manual_seed(0)
    base = saved(BertForSequenceClassification(BertConfig(**BERT)), tmp_path / "base", None)
    bank = trained(BertForTokenClassification.from_pretrained(base), tmp_path / "adapter", base, labels=3)
    code, out = merged(tmp_path, way)
    assert code == 0
    found = plain(BertForTokenClassification, out, input_ids=IDS)
    torch.testing.assert_close(found, beside(bank, input_ids=IDS)[..., :3], rtol=1e-4, atol=1e-5)


@WAYS
def test_added_tokens_bring_their_tokenizer(
    way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    model = LlamaForCausalLM.from_pretrained(base_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bank = trained(model, tmp_path / "adapter", base_folder, modules_to_save=["lm_head", "embed_tokens"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, out = merged(tmp_path, way)
    assert code == 0
    assert f"tokens: 260, the base's were 258; the tokenizer is that in {tmp_path / 'adapter'}" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out)("<tool>")["input_ids"] == [258]
    ids = torch.tensor([[3, 259, 258]])
    torch.testing.assert_close(plain(AutoModelForCausalLM, out, input_ids=ids), beside(bank, input_ids=ids), rtol=1e-4, atol=1e-5)


@WAYS
def test_what_the_base_lacks_and_the_adapter_too_is_refused(
    way: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = saved(BertModel(BertConfig(**BERT), add_pooling_layer=False), tmp_path / "base", base_folder)
    trained(BertForSequenceClassification.from_pretrained(base), tmp_path / "adapter", base)
    code, out = merged(tmp_path, way)
    assert code == 2 and not out.exists()
    assert "lack 2 of the weights of BertForSequenceClassification (bert.pooler.dense." in capsys.readouterr().err
    tied = AutoModelForCausalLM.from_pretrained(base_folder).config
    tied.tie_word_embeddings = True
    shutil.rmtree(tmp_path / "adapter")
    small = saved(LlamaForCausalLM(tied), tmp_path / "tied", base_folder)
    model = LlamaForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(260, mean_resizing=False)
    trained(model, tmp_path / "adapter", small, modules_to_save=["embed_tokens"])
    code, out = merged(tmp_path, way)
    assert code == 2 and not out.exists()
    assert "lm_head.weight" in capsys.readouterr().err


@WAYS
def test_the_task_type_decides_where_the_folder_names_another_class(way: list[str], base_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = saved(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "base", base_folder)
    bank = trained(BertForTokenClassification.from_pretrained(base), tmp_path / "adapter", base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    code, out = merged(tmp_path, way)
    assert code == 0
    expected = beside(bank, input_ids=IDS)
    torch.testing.assert_close(plain(BertForTokenClassification, out, input_ids=IDS), expected, rtol=1e-4, atol=1e-5)


@WAYS
def test_decomposed_slices_of_a_quantised_layer_leave_the_other_outputs_as_they_are(
    way: list[str], base_folder: Path, tmp_path: Path
) -> None:
    """Norms of their own come from the weights that are merged into, not from the quantised ones of the training."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = saved(GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT, **sizes)), tmp_path / "base", base_folder)
    model = GPTNeoXForCausalLM.from_pretrained(base)
    quantize_base(model, "fp8", emulate=True, say=lambda line: None)
    trained(model, tmp_path / "adapter", base, targets=["q"], use_dora=True)
    code, out = merged(tmp_path, way)
    assert code == 0
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    before, after = (tensors_in(folder)[name].view(2, 3, 16, 32) for folder in (base, out))
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])
