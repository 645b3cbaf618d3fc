"""Modules that were trained in full in PEFT's files, both ways, against the real library; other forms refuse them by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorabank as lb
from lorabank import Adapter, AdapterConfig, attach
from lorabank.bank.bank import saved_modules
from lorabank.errors import AdapterFileError, MergeError
from lorabank.formats.convert import convert
from lorabank.formats.diffusers import save_diffusers
from lorabank.formats.kohya import save_kohya
from lorabank.formats.readers import READERS, obstacles, refuse
from lorabank.formats.vllm import vllm_adapter
from tests.bank.tiny import VOCABULARY, ids, llama

_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS: dict[str, Any] = {**_SIZES, "vocab_size": VOCABULARY, "num_labels": 3}

CASES: Mapping[str, tuple[Callable[[], nn.Module], str | None, list[str], list[str] | None]] = {
    # model, PEFT's task type, target modules, modules_to_save as PEFT is told them
    "BERT, sequences": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**_WORDS)), "SEQ_CLS", ["query", "value"], None),
    "BERT, tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**_WORDS)), "TOKEN_CLS", ["query", "value"], None),
    "BERT, questions": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**_WORDS, "num_labels": 2})),
        "QUESTION_ANS",
        ["query"],
        None,
    ),
    "RoBERTa's head of layers": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_WORDS, max_position_embeddings=32)),
        "SEQ_CLS",
        ["query", "dense"],
        None,
    ),
    "Llama's score": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_WORDS, num_key_value_heads=1, pad_token_id=0)),
        "SEQ_CLS",
        ["q_proj", "down_proj"],
        None,
    ),
    "DistilBERT's two": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_heads=2, n_layers=1)
        ),
        "SEQ_CLS",
        ["q_lin"],
        None,
    ),
    "Llama's output head": (llama, "CAUSAL_LM", ["q_proj", "v_proj"], ["lm_head"]),
    "Llama's embedding and norms": (llama, "CAUSAL_LM", ["q_proj"], ["embed_tokens", "norm"]),
    "Llama's mlp": (llama, None, ["q_proj"], ["layers.1.mlp"]),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[kind][0]().eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=x)
    return found["start_logits"] if "start_logits" in found else found["logits"]


def trained_in_peft(kind: str) -> PeftModel:
    """PEFT's model, all that it trains moved from where it started."""
    _, task, targets, saved = CASES[kind]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=saved, task_type=task)
    model = get_peft_model(made(kind), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def trained_here(kind: str) -> tuple[Adapter, Tensor]:
    """An adapter that was moved from where it started, and its outputs in a bank."""
    model, (_, _, targets, saved) = made(kind), CASES[kind]
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=3, alpha=6, targets=targets, modules_to_save=saved))
    assert saved_modules(bank).paths("a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bank.parameters("a"):
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    with bank.route("a"):
        return bank.adapter("a"), outputs(model, ids(3))


@pytest.fixture(scope="module")
def score() -> Adapter:
    return trained_here("Llama's score")[0]


@pytest.mark.parametrize("kind", CASES)
def test_ours_computes_the_same_in_peft(kind: str, tmp_path: Path) -> None:
    """A tensor that PEFT misses or doesn't expect is a warning there, and so an error here."""
    adapter, expected = trained_here(kind)
    folder = adapter.save(tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == sorted(adapter.modules)
    assert settings["task_type"] == (CASES[kind][1] or "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(made(kind), folder).eval()
    torch.testing.assert_close(outputs(loaded, ids(3)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(made(kind), ids(3)), expected, atol=0.01)


@pytest.mark.parametrize("kind", CASES)
def test_pefts_computes_the_same_here(kind: str, tmp_path: Path) -> None:
    theirs = trained_in_peft(kind)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = Adapter.load(tmp_path / "theirs")
    assert {*adapter.modules} == _saved_in(theirs)
    model = made(kind)
    bank = attach(model)
    bank.load("a", adapter)
    with bank.route("a"):
        torch.testing.assert_close(outputs(model, ids(3)), outputs(theirs, ids(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["BERT, sequences", "RoBERTa's head of layers", "DistilBERT's two"])
def test_with_all_biases_peft_saves_a_heads_bias_three_times(kind: str, tmp_path: Path) -> None:
    """Its own by two names, and the base's under `original_module`, which nothing computes with."""
    _, task, targets, saved = CASES[kind]
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=targets, modules_to_save=saved, task_type=task, bias="all", init_lora_weights=False)
    theirs = get_peft_model(made(kind), config).eval()
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape) * 0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert any(".original_module." in name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    model = made(kind)
    bank = attach(model)
    bank.load("a", Adapter.load(tmp_path / "theirs"))
    with bank.route("a"):
        torch.testing.assert_close(outputs(model, ids(3)), outputs(theirs, ids(3)), rtol=1e-4, atol=1e-5)


def _saved_in(model: PeftModel) -> set[str]:
    wrappers = (path for path, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper")
    return {path.removeprefix("base_model.model.") for path in wrappers}


@pytest.mark.parametrize("kind", CASES)
def test_the_head_that_peft_adds_by_task_type_is_the_head_here(kind: str) -> None:
    _, task, targets, saved = CASES[kind]
    bank = attach(made(kind))
    bank.add("a", LoraConfig(r=3, target_modules=targets, modules_to_save=saved, task_type=task))
    assert {*saved_modules(bank).paths("a")} == _saved_in(trained_in_peft(kind))
    bank.remove("a")


@pytest.mark.parametrize("kind", ["RoBERTa's head of layers", "Llama's embedding and norms"])
def test_law6_saved_and_loaded_and_saved_it_is_the_same_bytes(kind: str, tmp_path: Path) -> None:
    adapter, _ = trained_here(kind)
    first = adapter.save(tmp_path / "first")
    second = Adapter.load(first).save(tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    (first / "lorabank.json").unlink()  # as PEFT would have it
    again = Adapter.load(first)
    assert again.modules.keys() == adapter.modules.keys()
    assert again.config.modules_to_save == tuple(sorted(adapter.modules))
    assert all(torch.equal(v, again.modules[p][k]) for p, module in adapter.modules.items() for k, v in module.items())


def test_a_classifier_of_other_labels_than_the_models_is_saved_and_loaded(tmp_path: Path) -> None:
    bank = attach(made("BERT, sequences"))
    bank.add("five", AdapterConfig(rank=2), num_labels=5)
    loaded = Adapter.load(bank.adapter("five").save(tmp_path / "five"))
    bank.load("again", loaded)
    assert dict(bank.named_parameters("again"))["classifier.weight"].shape == (5, 16)


# ---- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RoBERTa's head of layers", "Llama's score", "Llama's embedding and norms"])
def test_law5_a_merged_model_has_the_modules_values_and_is_restored(kind: str) -> None:
    adapter, expected = trained_here(kind)
    model = made(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = (
        lb.merge(model, adapter, inputs={"input_ids": ids(3)}, say=None)
        if "score" in kind
        else lb.merge(model, adapter, say=None)
    )
    torch.testing.assert_close(outputs(model, ids(3)), expected, rtol=1e-4, atol=1e-5)
    for path, module in adapter.modules.items():
        own = model.get_submodule(path).state_dict()
        assert all(torch.equal(own[key], value) for key, value in module.items())
    if handle.logits is not None:
        assert handle.logits.difference < 1e-4 < handle.logits.change
    handle.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_a_merge_cant_do_with_a_module_is_refused_and_the_model_is_as_it_was(score: Adapter) -> None:
    model = made("Llama's score")
    before = copy.deepcopy(model.state_dict())
    wide = hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**_WORDS, "num_labels": 7}, num_key_value_heads=1, pad_token_id=0))
    with pytest.raises(MergeError, match="'score' was trained in full, and is merged whole; leave strength out"):
        lb.merge(model, score, strength=0.5)
    with pytest.raises(MergeError, match=r"module 'score': 'weight' is \(3, 16\) in the adapter and \(7, 16\) in the model"):
        lb.merge(wide, score, force=True)
    with pytest.raises(MergeError, match=r"the model has no module 'score'"):
        lb.merge(llama(), score, force=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tied, adapter = llama(tie_word_embeddings=True), trained_here("Llama's output head")[0]
    with pytest.raises(MergeError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        lb.merge(tied, adapter, force=True)


# ---- forms and tools that can't hold them -----------------------------------------------------------------------------


def test_no_other_form_drops_a_module_in_silence(score: Adapter, tmp_path: Path) -> None:
    says = r"can't hold modules that were trained in full \(score\)"
    with pytest.raises(AdapterFileError, match=says):
        save_kohya(score, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=says):
        save_diffusers(score, tmp_path / "b.safetensors")
    folder = score.save(tmp_path / "peft")
    for form in ("kohya", "diffusers"):
        with pytest.raises(AdapterFileError):
            convert(folder, tmp_path / "c.safetensors", form)
    assert not list(tmp_path.glob("*.safetensors"))
    assert convert(folder, tmp_path / "again", "peft").adapter.modules.keys() == {"score"}
    assert vllm_adapter(score).modules.keys() == {"score"}  # which it reads
    assert obstacles(score, "vllm") == []
    for reader in ("older vllm", "gguf", "merged gguf"):
        assert any("trained in full" in each.what for each in obstacles(score, reader)), reader
    assert {*READERS} == {"vllm", "older vllm", "gguf", "merged gguf", "combine", "older peft", "merge"}
    for reader in ("older peft", "combine", "merge"):
        refuse(score, reader)


def test_convert_measures_what_a_dtype_loses_of_a_module(score: Adapter, tmp_path: Path) -> None:
    """LoRA's own numbers fit into bf16 here, so the module alone is rounded."""
    lora = {
        path: replace(layer, A=layer.A.bfloat16().float(), B=layer.B.bfloat16().float()) for path, layer in score.layers.items()
    }
    folder = replace(score, layers=lora).save(tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"modules in full with a relative error of 0\.0"):
        convert(folder, tmp_path / "b", "peft", dtype=torch.bfloat16)
    assert not (tmp_path / "b").exists()
    done = convert(folder, tmp_path / "b", "peft", dtype=torch.bfloat16, lossy=True)
    assert done.error.worst == 0 < done.beside < 0.01
    large = {"score": {"weight": score.modules["score"]["weight"] * 1e6}}
    folder = replace(score, layers=lora, modules=large).save(tmp_path / "c")
    with pytest.raises(AdapterFileError, match="module 'score' has numbers above 65504"):
        convert(folder, tmp_path / "d", "peft", dtype=torch.float16, lossy=True)


# ---- bad files --------------------------------------------------------------------------------------------------------


def _changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    (folder / "lorabank.json").unlink()
    path = folder / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(KEY), r"modules_to_save names 'score', and no tensor of such a module is there"),
        (
            lambda t: t.update({"base_model.model.extra.weight": torch.ones(2)}),
            r"'base_model.model.extra.weight' is a module saved in",
        ),
        (lambda t: t.update({KEY: torch.full((3, 16), torch.nan)}), r"'base_model.model.score.weight' holds NaN"),
        (
            lambda t: t.update({"base_model.model.score.modules_to_save.other.weight": torch.ones(3, 16)}),
            r"is a second 'weight' of module 'score': two adapters in a file",
        ),
        (
            lambda t: t.update({KEY: torch.ones(3, 16, dtype=torch.int32)}),
            "module 'score': saved in full, and none of its tensors",
        ),
    ],
)
def test_a_file_that_lacks_or_doubles_a_module_is_refused(
    change: Callable[[dict[str, Tensor]], object], says: str, score: Adapter, tmp_path: Path
) -> None:
    folder = score.save(tmp_path / "a")
    _changed(folder, change)
    with pytest.raises(AdapterFileError, match=says):
        Adapter.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("bias", torch.ones(5), r"'weight' \(3, 16\) and 'bias' \(5,\) are of different numbers of labels"),
        ("bias", torch.ones(3, dtype=torch.int64), r"'bias' is torch\.int64; expected float32"),
    ],
)
def test_a_head_that_doesnt_fit_itself_is_refused_when_it_is_loaded(key: str, value: Tensor, says: str, tmp_path: Path) -> None:
    adapter, _ = trained_here("BERT, sequences")
    folder = adapter.save(tmp_path / "a")
    _changed(folder, lambda t: t.update({f"base_model.model.classifier.{key}": value}))
    bank = attach(made("BERT, sequences"))
    with pytest.raises(AdapterFileError, match=says):
        bank.load("a", Adapter.load(folder))
    assert not bank.names
    with pytest.raises(MergeError, match="'bias' is"):
        lb.merge(made("BERT, sequences"), Adapter.load(folder), say=None)


def test_a_module_under_its_wrappers_name_is_read(score: Adapter, tmp_path: Path) -> None:
    folder = score.save(tmp_path / "a")
    _changed(folder, lambda t: t.update({"base_model.model.score.modules_to_save.default.weight": t.pop(KEY)}))
    assert torch.equal(Adapter.load(folder).modules["score"]["weight"], score.modules["score"]["weight"])


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (
            {"scores": {"weight": torch.ones(3, 16)}},
            r"module 'scores', saved in full: the model has no such module \(did you mean 'score'",
        ),
        (
            {"score": {"weight": torch.ones(3, 17)}},
            r"module 'score', saved in full: 'weight' is \(3, 17\), the model has \(3, 16\)",
        ),
        ({"score": {"wait": torch.ones(3, 16)}}, r"module 'score', saved in full: 'wait' is not in the model"),
        ({"model": {"weight": torch.ones(3, 16)}}, r"module 'model', saved in full: .* is not in the file"),
    ],
)
def test_a_module_that_doesnt_fit_leaves_the_bank_as_it_was(
    modules: dict[str, dict[str, Tensor]], says: str, score: Adapter
) -> None:
    model = made("Llama's score")
    bank = attach(model)
    types = {path: type(m) for path, m in model.named_modules()}
    with pytest.raises(AdapterFileError, match=says):
        bank.load("a", replace(score, modules=modules))
    assert bank.names == ()
    assert {path: type(m) for path, m in model.named_modules()} == types


def test_two_adapters_of_one_module_and_lora_in_it_arent_saved(score: Adapter, tmp_path: Path) -> None:
    both = replace(score, modules={"model.layers.0": score.modules["score"]})
    with pytest.raises(AdapterFileError, match=r"'model.layers.0' is saved in full and layer 'model.layers.0.* in it has LoRA"):
        both.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
