"""Combining what is trained as a whole: modules in full, heads of new labels, biases, and rows of tokens that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.cli import main
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.merging.combine import combine, combine_and_measure
from lorabank.merging.merge import merge
from tests.merging.conftest import gpt2, llama

IDS = torch.tensor([[3, 5, 9, 2], [7, 3, 1, 1]])
BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def add(bank: AdapterBank, name: str, seed: int, *, labels: int | None = None, **settings: Any) -> Adapter:
    config = AdapterConfig(**{"rank": 2, "targets": ["q", "v"], **settings})
    bank.add(name, config) if labels is None else bank.add(name, config, num_labels=labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in bank.parameters(name):
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    return bank.adapter(name)


def logits(bank: AdapterBank, route: str | Mapping[str, float]) -> Tensor:
    with torch.no_grad(), bank.route(route):
        return bank.model(input_ids=IDS).logits


def merged_logits(model: Any, adapter: Adapter) -> Tensor:
    handle = merge(model, adapter, say=None)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    handle.unmerge()
    return found


def classifier(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**BERT)).eval()


def test_law7_modules_in_full_are_the_mixture_where_weights_sum_to_one(tmp_path: Path) -> None:
    """Two adapters with a head of their own, and a third without, whose weight is free."""
    bank = attach(llama())
    a, b = (add(bank, name, seed, modules_to_save=["lm_head", "norm"]) for seed, name in enumerate("ab"))
    c = add(bank, "c", 2)
    mixed = combine([(a, 1.5), (b, -0.5), (c, 0.3)])
    assert mixed.config.modules_to_save is not None
    loaded = Adapter.load(mixed.save(tmp_path / "mixed"))
    assert loaded.modules.keys() == a.modules.keys()
    bank.load("mixed", loaded)
    expected = logits(bank, {"a": 1.5, "b": -0.5, "c": 0.3})
    torch.testing.assert_close(logits(bank, "mixed"), expected, rtol=1e-4, atol=1e-4)
    base = bank.detach()
    torch.testing.assert_close(merged_logits(base, loaded), expected, rtol=1e-4, atol=1e-4)


def test_one_adapters_module_with_the_weight_one_is_its_own_to_the_bit() -> None:
    bank = attach(llama())
    a, c = add(bank, "a", 0, modules_to_save=["lm_head"]), add(bank, "c", 2)
    mixed = combine([(c, -2.0), (a, 1.0)])
    assert torch.equal(mixed.modules["lm_head"]["weight"], a.modules["lm_head"]["weight"])
    bank.load("mixed", mixed)
    torch.testing.assert_close(logits(bank, "mixed"), logits(bank, {"a": 1.0, "c": -2.0}), rtol=1e-4, atol=1e-4)
    assert combine([(a, 0.0), (c, 1.0)]).modules == {}


def test_another_sum_needs_the_base_and_is_refused_by_name() -> None:
    bank = attach(llama())
    a, b = (add(bank, name, seed, modules_to_save=["lm_head"]) for seed, name in enumerate("ab"))
    c = add(bank, "c", 2)
    for parts, told in (
        ([(a, 0.7), (b, 0.7)], r"they are 0\.7 of adapter 'x', 0\.7 of adapter 'y'\. Choose such weights"),
        ([(a, 0.5), (c, 0.5)], r"they are 0\.5 of adapter 'x'\. Choose such weights"),
    ):
        with pytest.raises(MergeError, match=rf"module 'lm_head' is trained as a whole, .*have this sum to 1; {told}"):
            combine_and_measure(parts, names=["x", "y"])
    with pytest.raises(MergeError, match=r"module 'lm_head' is trained as a whole, and adapter 1 has weights by part"):
        combine([(c, 1.0), (a, {"*": 1.0})])
    with pytest.raises(MergeError, match=r"of 'lm_head' in adapter 0 every parameter is trained, and 'svd' is about changes"):
        combine([(a, 0.5), (b, 0.5)], "svd")


def test_a_head_of_new_labels_travels_as_it_is() -> None:
    bank = attach(classifier())
    a = add(bank, "a", 0, labels=3)
    b = add(bank, "b", 1, modules_to_save=[], targets=["q"])
    assert (a.task_type, b.task_type) == ("SEQ_CLS", None)
    with pytest.warns(UserWarning, match=r"'classifier' of adapter 1 is taken as it is, whatever its weight"):
        mixed = combine([(b, 0.4), (a, 0.6)])
    assert mixed.task_type == "SEQ_CLS"
    for key, value in a.modules["classifier"].items():
        assert torch.equal(mixed.modules["classifier"][key], value)
    bank.load("mixed", mixed)
    layers = replace(a, layers=mixed.layers, config=replace(a.config, targets=sorted(mixed.layers)))
    bank.load("layers", layers)
    assert torch.equal(logits(bank, "mixed"), logits(bank, "layers"))


def test_heads_of_one_task_are_averaged_and_others_refused() -> None:
    bank = attach(classifier())
    a, b, wide = add(bank, "a", 0), add(bank, "b", 1), add(bank, "wide", 2, labels=3)
    mixed = combine([(a, 0.25), (b, 0.75)])
    bank.load("mixed", mixed)
    torch.testing.assert_close(logits(bank, "mixed"), logits(bank, {"a": 0.25, "b": 0.75}), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        MergeError, match=r"'(weight|bias)' of module 'classifier' is \S.* in adapter 0 and \S.* in adapter 1; .*labels"
    ):
        combine([(a, 0.5), (wide, 0.5)])
    tokens = replace(b, task_type="TOKEN_CLS")
    with pytest.raises(MergeError, match=r"module 'classifier' is the head of different tasks \(SEQ_CLS, TOKEN_CLS\)"):
        combine([(a, 0.5), (tokens, 0.5)])
    answers = replace(b, task_type="QUESTION_ANS", modules={"qa_outputs": b.modules["classifier"]})
    with pytest.raises(
        MergeError, match=r"'classifier' of SEQ_CLS and 'qa_outputs' of QUESTION_ANS are heads of different tasks"
    ):
        combine([(a, 1.0), (answers, 1.0)])
    assert combine([(a, 0.0), (answers, 1.0)]).task_type == "QUESTION_ANS"


def test_heads_of_other_labels_never_add_up_and_what_all_say_is_kept() -> None:
    """Two outputs that mean neg and pos, and two that mean yes and no, have one shape."""
    bank = attach(classifier())
    mood = {"task": "text-classification", "labels": '["neg", "pos"]', "labels.kind": "single"}
    a = replace(add(bank, "a", 0), metadata={**mood, "peft.note": "its file's own", "combine.method": "exact", "said": "by one"})
    b = replace(add(bank, "b", 1), metadata={**mood, "peft.note": "its file's own", "said": "by two"})
    kept = combine([(a, 0.5), (b, 0.5)]).metadata
    assert {key: value for key, value in kept.items() if not key.startswith("combine.")} == mood
    other = replace(b, metadata={**mood, "labels": '["pos", "neg"]'})
    with pytest.raises(MergeError, match="head of adapter 0 has the labels neg, pos, that of adapter 1 pos, neg"):
        combine([(a, 0.5), (other, 0.5)])
    assert combine([(a, 0.0), (other, 1.0)]).metadata["labels"] == '["pos", "neg"]'
    unknown = replace(b, metadata={})
    assert "labels" not in combine([(a, 0.5), (unknown, 0.5)]).metadata


def test_settings_that_differ_are_named_and_those_that_agree_are_kept() -> None:
    """Whisper's adapters are used again with what they were trained with: a window that only one has isn't lost in silence."""
    bank = attach(llama())

    def trained(name: str, seed: int, **settings: Any) -> Adapter:
        return replace(add(bank, name, seed), metadata={"speech": json.dumps(settings)} if settings else {})

    a = trained("a", 0, window=2.0, language="de", task="transcribe")
    b = trained("b", 1, window=10.0, language="de", task="transcribe")
    with pytest.warns(
        UserWarning,
        match=r"different settings: speech\.window \(adapter 0 2\.0, adapter 1 10\.0\)\. .* defaults \(speech\.window 30\.0\)",
    ):
        mixed = combine([(a, 0.5), (b, 0.5)])
    assert json.loads(mixed.metadata["speech"]) == {"language": "de", "task": "transcribe"}
    assert combine([(a, 1.0), (b, 0.0)]).metadata["speech"] == a.metadata["speech"], "without a warning"
    with pytest.warns(UserWarning, match=r"speech\.window \(adapter 0 2\.0, adapter 1 unsaid\); speech\.language \(adapter 0 de"):
        assert "speech" not in combine([(a, 0.5), (trained("c", 2), 0.5)]).metadata


def test_what_one_trains_in_full_and_another_otherwise() -> None:
    bank = attach(llama())
    a = add(bank, "a", 0, modules_to_save=["lm_head"])
    other = attach(llama())
    b = add(other, "b", 1, targets=["lm_head"])
    with pytest.raises(
        MergeError, match=r"'lm_head' was trained in full in adapter 0, and 'lm_head' is changed otherwise in adapter 1"
    ):
        combine([(a, 1.0), (b, 1.0)])
    whole = replace(
        a,
        modules={"model": {"norm.weight": torch.ones(32)}},
        layers={"lm_head": AdapterLayer(torch.ones(1, 32), torch.ones(64, 1), 1.0)},
    )
    inner = replace(a, modules={"model.norm": {"weight": torch.ones(32)}}, layers=whole.layers)
    with pytest.raises(MergeError, match=r"'model' was trained in full in adapter 0, and 'model\.norm' in it in adapter 1"):
        combine([(whole, 1.0), (inner, 1.0)])
    broken = replace(a, modules={"lm_head": {"weight": a.modules["lm_head"]["weight"] * torch.nan}})
    with pytest.raises(MergeError, match=r"'weight' of module 'lm_head' is NaN or infinity in part in adapter 0"):
        combine([(broken, 1.0)])
    more = replace(a, modules={"lm_head": {**a.modules["lm_head"], "bias": torch.ones(64)}})
    with pytest.raises(MergeError, match=r"module 'lm_head' has 'bias' in only one of adapter 0 and adapter 1"):
        combine([(a, 0.5), (more, 0.5)])


def test_rows_of_different_tokens_add_up_each_with_weights_of_one(tmp_path: Path) -> None:
    bank = attach(llama(tied=True))
    a, b = add(bank, "a", 0, trainable_token_indices=[3, 5]), add(bank, "b", 1, trainable_token_indices=[9, 7])
    mixed = combine([(a, 1.0), (b, 1.0)])
    assert mixed.token_rows["model.embed_tokens"].ids == (3, 5, 9, 7)
    bank.load("mixed", Adapter.load(mixed.save(tmp_path / "mixed")))
    torch.testing.assert_close(logits(bank, "mixed"), logits(bank, {"a": 1.0, "b": 1.0}), rtol=1e-4, atol=1e-4)
    c = add(bank, "c", 2, trainable_token_indices=[5, 9])
    message = r"the row of token 5 in 'model\.embed_tokens' is trained as a whole.*they are 1 of adapter 0, 0\.5 of adapter 1\."
    with pytest.raises(MergeError, match=message):
        combine([(a, 1.0), (c, 0.5)])


@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc"]], ids=["the same layers", "other layers"])
def test_biases_of_one_adapter_beside_another_without(targets: list[str], tmp_path: Path) -> None:
    bank = attach(gpt2())
    a = add(bank, "a", 0, targets=["c_attn"], bias="lora_only")
    b = add(bank, "b", 1, targets=targets)
    mixed = combine([(a, 1.0), (b, 0.5)])
    bank.load("mixed", Adapter.load(mixed.save(tmp_path / "mixed")))
    torch.testing.assert_close(logits(bank, "mixed"), logits(bank, {"a": 1.0, "b": 0.5}), rtol=1e-4, atol=1e-4)
    both = add(bank, "both", 2, targets=targets, bias="lora_only")
    assert combine([(a, 0.5), (both, 0.5)] if targets == ["c_attn"] else [(a, 1), (both, 1)]).config.bias == "lora_only"


def test_messages_name_the_adapters_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = attach(llama(tied=True))
    folders = {}
    for seed, name in enumerate(("one", "two")):
        folders[name] = str(tmp_path / name)
        add(bank, name, seed, trainable_token_indices=[3, 5]).save(folders[name])
    out = str(tmp_path / "out")
    assert main(["combine", f"{folders['one']}:1", f"{folders['two']}:1", "--output", out]) == 2
    told = capsys.readouterr().err
    assert (
        f"1 of adapter '{folders['one']}', 1 of adapter '{folders['two']}'" in told
        and "rows of 'model.embed_tokens' are trained" in told
    )
    assert main(["combine", folders["one"], folders["two"], "-w", "1", "-w", "*=0.5", "--output", out]) == 2
    assert f"and adapter '{folders['two']}' has weights by part" in capsys.readouterr().err


def test_peft_loads_the_combination_with_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
        settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(tmp_path / name)
    parts = [f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'b'}:0.5"]
    assert main(["combine", *parts, "--output", str(tmp_path / "mixed")]) == 0
    mixed = Adapter.load(tmp_path / "mixed")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "mixed").eval()
        expected = wrapped(input_ids=IDS).logits
    plain: nn.Module = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0).eval()
    torch.testing.assert_close(merged_logits(plain, mixed), expected, rtol=1e-4, atol=1e-5)
