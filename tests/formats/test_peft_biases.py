"""PEFT's files of trained biases, lora_B's biases and token rows, both ways: the same outputs in PEFT and here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lorabank import Adapter, attach, merge
from lorabank.errors import AdapterFileError, MergeError, TargetError
from lorabank.formats.convert import convert
from lorabank.formats.diffusers import save_diffusers
from lorabank.formats.kohya import save_kohya
from lorabank.formats.readers import obstacles
from lorabank.formats.token_rows import TokenRows
from lorabank.formats.vllm import vllm_adapter
from lorabank.training.serving import serve_lines
from tests.bank.tiny import VOCABULARY, Handwritten, add, bert, gpt2, ids, llama, outputs, t5

PREFIX = "base_model.model."
IDS = [30, 7]


@pytest.fixture(autouse=True)
def silence() -> Any:
    """What PEFT and its parts say about files that are as they should be."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Adapter 'default': .* LoRA tensor.* have invalid shape")  # said of lora_B's biases
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")
        yield


def biased(tie: bool = False) -> LlamaForCausalLM:
    return llama(tie_word_embeddings=tie, attention_bias=True)


def tied() -> LlamaForCausalLM:
    return biased(True)


def grown() -> LlamaForCausalLM:
    model = tied()
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    return model


def made(make_model: Callable[[], nn.Module]) -> nn.Module:
    """The same weights each time; no bias is zero."""
    torch.manual_seed(0)
    model = make_model().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.normal_(std=0.3)
    return model


def x_with_ids(first: int = IDS[0]) -> Tensor:
    x = ids(3)
    x[:, 0], x[:, 2] = first, IDS[1]
    return x


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora_bias": (gpt2, {"lora_bias": True}),
    "lora_bias without biases": (llama, {"lora_bias": True}),
    "lora_only": (biased, {"bias": "lora_only"}),
    "lora_only and lora_bias": (biased, {"bias": "lora_only", "lora_bias": True}),
    "lora_only with DoRA": (gpt2, {"bias": "lora_only", "use_dora": True}),
    "all": (gpt2, {"bias": "all"}),
    "all of BERT": (bert, {"bias": "all", "targets": ["query", "value"]}),
    "all with DoRA": (gpt2, {"bias": "all", "use_dora": True}),
    "rows, tied": (tied, {"trainable_token_indices": IDS}),
    "rows, not tied": (biased, {"trainable_token_indices": IDS}),
    "rows by name": (biased, {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [3, 30]}}),
    "rows of a head": (biased, {"trainable_token_indices": {"lm_head": IDS}}),
    "rows, grown": (grown, {"trainable_token_indices": [VOCABULARY + 1, IDS[1]]}),
    "rows of T5": (t5, {"trainable_token_indices": IDS}),
    "everything": (gpt2, {"bias": "all", "lora_bias": True, "trainable_token_indices": IDS}),
}


@pytest.mark.parametrize(("make_model", "config"), CASES.values(), ids=CASES.keys())
def test_ours_in_peft(make_model: Callable[[], nn.Module], config: dict[str, Any], tmp_path: Path) -> None:
    x = x_with_ids(VOCABULARY + 1 if make_model is grown else IDS[0])
    bank = attach(made(make_model))
    add(bank, "a", **config)
    expected = outputs(bank.model, x).detach()
    adapter = bank.adapter("a")
    adapter.save(tmp_path / "one")
    base = made(make_model)
    plain = outputs(base, x).detach()
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "one")).eval()
    found = outputs(theirs.get_base_model(), x).detach()  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    # without what this is about the outputs would be others
    bare = attach(made(make_model))
    layers = {path: replace(layer, lora_bias=None) for path, layer in adapter.layers.items()}
    none = replace(adapter.config, bias="none", lora_bias=False, trainable_token_indices=())
    bare.load("a", replace(adapter, config=none, layers=layers, biases={}, token_rows={}))
    assert not torch.allclose(outputs(bare.model, x), expected, atol=1e-2)
    loaded = Adapter.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert loaded.config == adapter.config
    assert loaded.num_parameters == adapter.num_parameters == sum(p.numel() for p in bank.parameters("a"))


def test_rows_of_a_module_that_doesnt_tell_its_table_are_read_by_peft(tmp_path: Path) -> None:
    """PEFT looks for a table called `embed_tokens` where a list of ids is all that the settings say."""
    bank = attach(made(Handwritten))
    add(bank, "a", targets=["blocks.*"], trainable_token_indices=IDS)
    bank.adapter("a").save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(Handwritten), str(tmp_path)).eval()  # type: ignore[arg-type]
    with bank.route("a"):
        torch.testing.assert_close(theirs(x_with_ids()), outputs(bank.model, x_with_ids()), rtol=1e-4, atol=1e-5)


THEIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora_bias": (gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "lora_only": (biased, {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "lora_only with DoRA": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "use_dora": True, "fan_in_fan_out": True},
    ),
    "all": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "all of BERT": (bert, {"target_modules": ["query"], "bias": "all", "lora_bias": True}),
    "rows, tied": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": IDS}),
    "rows, not tied": (biased, {"target_modules": ["q_proj"], "trainable_token_indices": IDS}),
    "rows, tied and both named": (
        tied,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    ),
    "rows by name": (
        biased,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": IDS, "lm_head": [3, 30]}},
    ),
    "rows of a tied head": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": IDS}}),
    "rows of T5": (t5, {"target_modules": ["q"], "trainable_token_indices": IDS}),
    "rows of T5 by name": (t5, {"target_modules": ["q"], "trainable_token_indices": {"shared": IDS, "lm_head": IDS}}),
}


@pytest.mark.parametrize(("make_model", "config"), THEIRS.values(), ids=THEIRS.keys())
def test_theirs_here(make_model: Callable[[], nn.Module], config: dict[str, Any], tmp_path: Path) -> None:
    x = x_with_ids()
    wanted = peft.LoraConfig(r=2, lora_alpha=6, **config)
    theirs = peft.get_peft_model(made(make_model), wanted).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        expected = outputs(theirs.get_base_model(), x)  # type: ignore[arg-type]
        theirs.save_pretrained(str(tmp_path))
        model = made(make_model)
        plain = outputs(model, x)
        bank = attach(model)
        bank.load("a", Adapter.load(tmp_path))
        torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=2e-3)
    ours = {name for name, _ in bank.named_parameters("a")}
    if make_model is bert:  # by itself a new adapter has a head of its own, which isn't for one bank with a bias of the base's
        with pytest.raises(TargetError, match="layer 'classifier' has another adapter's LoRA, bias or token rows"):
            bank.add("fresh", wanted)
        wanted.modules_to_save = []
    bank.add("fresh", wanted)
    assert {name for name, _ in bank.named_parameters("fresh")} == ours
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in bank.parameters("fresh")) == trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with all of them."""
    bank = attach(made(gpt2))
    add(bank, "a", rank=1, targets=["c_attn"], **CASES["everything"][1])
    bank.adapter("a").save(tmp_path / "a")
    (tmp_path / "a" / "lorabank.json").unlink()
    return tmp_path / "a"


def edit(folder: Path, settings: dict[str, Any], change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    tensors = {name: value.clone() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


LOW, ROWS = f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.bias", f"{PREFIX}transformer.wte.token_adapter.trainable_tokens_delta"
BAD: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "no lora_bias": (
        {"lora_bias": False},
        lambda t: None,
        r"is a bias of lora_B, and adapter_config\.json says lora_bias: False",
    ),
    "no bias": ({"bias": "none"}, lambda t: None, r"is a trained bias, and adapter_config\.json says bias: 'none'"),
    "only adapted": ({"bias": "lora_only"}, lambda t: None, r"c_proj\.bias' is a module saved in full"),
    "no ids": ({"trainable_token_indices": None}, lambda t: None, "is trained token embeddings, and adapter_config"),
    "other ids": (
        {"trainable_token_indices": [3]},
        lambda t: None,
        r"has token rows \(2, 16\), and trainable_token_indices names 1",
    ),
    "ids of another": ({"trainable_token_indices": {"wpe": [3]}}, lambda t: None, "trainable_token_indices names no ids for it"),
    "an id twice": ({"trainable_token_indices": [3, 3]}, lambda t: None, "trainable_token_indices: id 3 stands there twice"),
    "rows gone": ({}, lambda t: t.pop(ROWS), r"there is no '\.trainable_tokens_delta': it is incomplete"),
    "a bias too long": ({}, lambda t: t.update({LOW: torch.zeros(5)}), r"has a bias of lora_B \(5,\) for 48 outputs"),
    "a bias of no layer": (
        {},
        lambda t: t.update({f"{PREFIX}x.lora_B.bias": torch.zeros(5)}),
        "layer 'x' has a bias of lora_B and no lora_A",
    ),
    "one of two gone": ({}, lambda t: t.pop(LOW), r"has no '\.lora_B\.bias' and others have: it is incomplete"),
    "no names": ({"target_parameters": True}, lambda t: None, "target_parameters should be a list of names, got true"),
    "not a number": ({}, lambda t: t.update({ROWS: torch.full((2, 16), float("nan"))}), "holds NaN or infinity"),
    "whole numbers": ({}, lambda t: t.update({LOW: torch.zeros(48, dtype=torch.int64)}), r"is torch\.int64"),
    "no such mode": ({"bias": "boft_only"}, lambda t: None, "bias in .* should be one of none, all, lora_only, got 'boft_only'"),
}


@pytest.mark.parametrize(("settings", "change", "said"), BAD.values(), ids=BAD.keys())
def test_files_that_dont_fit_together_are_named(folder: Path, settings: Any, change: Any, said: str) -> None:
    edit(folder, settings, change)
    with pytest.raises(AdapterFileError, match=said):
        Adapter.load(folder)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_file_that_lost_a_bias_is_refused_by_the_model(mode: str, tmp_path: Path) -> None:
    """PEFT saves every bias that the setting means, whatever `exclude_modules` says."""
    wanted = peft.LoraConfig(r=2, target_modules=["c_attn"], exclude_modules=["h.0.attn.c_attn"], bias=mode, fan_in_fan_out=True)  # type: ignore[arg-type]
    peft.get_peft_model(made(gpt2), wanted).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    model = made(gpt2)
    bank = attach(model)
    bank.load("whole", Adapter.load(tmp_path))
    layer = "transformer.h.1.attn.c_attn"
    gone = f"{PREFIX}transformer.ln_f.bias" if mode == "all" else f"{PREFIX}{layer}.base_layer.bias"
    edit(tmp_path, {}, lambda tensors: tensors.pop(gone))
    lost = Adapter.load(tmp_path)
    path = gone.removeprefix(PREFIX).replace(".base_layer", "")
    said = (
        rf"{path}: bias is '{mode}' and the adapter has none for it: it is incomplete\. Fetch it again, or name .*exclude_modules"
    )
    with pytest.raises(AdapterFileError, match=said):
        bank.load("lost", lost)
    with pytest.raises(MergeError, match=said):
        merge(made(gpt2), lost, say=None)
    assert bank.names == ("whole",)
    if mode == "all":
        edit(tmp_path, {"exclude_modules": ["h.0.attn.c_attn", "ln_f"]})
        bank.load("less", Adapter.load(tmp_path))


def test_slices_with_the_bias_of_their_layer_come_back(tmp_path: Path) -> None:
    """The bias is the whole layer's, and the layers that are read are its slices."""
    bank = attach(made(gpt2))
    add(bank, "a", targets=["q", "v"], bias="lora_only")
    bank.adapter("a").save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert "transformer.h.0.attn.c_attn.q" in loaded.layers
    assert "transformer.h.0.attn.c_attn" in loaded.biases
    bank.load("b", loaded)
    x = x_with_ids()
    with bank.route("a"):
        expected = outputs(bank.model, x)
    with bank.route("b"):
        torch.testing.assert_close(outputs(bank.model, x), expected)


def test_rows_that_are_named_and_arent_there_are_refused(tmp_path: Path) -> None:
    """Of tied tables with the same ids PEFT saves one; else each that is named has its rows."""
    head = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
    for ids_of_head in ([3, 30, 5], IDS):
        bank = attach(made(biased))
        add(bank, "a", targets=["q_proj"], trainable_token_indices={"embed_tokens": IDS, "lm_head": ids_of_head})
        bank.adapter("a").save(tmp_path)
        (tmp_path / "lorabank.json").unlink()
        edit(tmp_path, {}, lambda tensors: tensors.pop(head))
        if ids_of_head is not IDS:
            with pytest.raises(AdapterFileError, match="names 'lm_head' and there are no rows of it: it is incomplete"):
                Adapter.load(tmp_path)
    lost = Adapter.load(tmp_path)
    bank = attach(made(biased))
    with pytest.raises(AdapterFileError, match=r"token rows of lm_head: .* the adapter has none: it is incomplete"):
        bank.load("b", lost)
    attach(made(tied)).load("b", lost)


def test_some_lora_biases_and_not_others_arent_pefts() -> None:
    bank = attach(made(gpt2))
    add(bank, "a", targets=["c_attn"], lora_bias=True)
    adapter = bank.adapter("a")
    first, *_ = adapter.layers
    some = {path: replace(layer, lora_bias=None) if path == first else layer for path, layer in adapter.layers.items()}
    with pytest.raises(AdapterFileError, match=f"module '{first}': PEFT's form can't hold it: lora_B of other layers has a bias"):
        replace(adapter, layers=some).save("never")
    with pytest.raises(AdapterFileError, match="its bias was trained, and the configuration says bias: none"):
        replace(adapter, biases={"transformer.ln_f": torch.zeros(16)}).save("never")


def test_other_forms_and_tools_refuse_by_name(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder)
    for reader in ("vllm", "gguf", "merged gguf"):
        found = [each for each in obstacles(adapter, reader) if "trained biases or token rows" in each.what]
        assert found
        assert "transformer.wte" in found[0].layers
        assert "transformer.ln_f" in found[0].layers
    assert "vLLM reads no trained biases or token rows" in serve_lines("base", {"a": str(folder)})[1][0]
    with pytest.raises(AdapterFileError, match="vLLM reads no trained biases or token rows"):
        vllm_adapter(adapter)
    for to, save in (("kohya", save_kohya), ("diffusers", save_diffusers)):
        with pytest.raises(AdapterFileError, match=f"{to}'s? form holds low-rank changes only, and of"):
            save(adapter, tmp_path / to)
        with pytest.raises(AdapterFileError, match=f"the form of {to} holds low-rank changes only, and of"):
            convert(folder, tmp_path / to, to, lossy=True)
        assert not (tmp_path / to).exists()
    assert "PEFT reads lora_bias from 0.14 on" in {each.what for each in obstacles(adapter, "older peft")}


def test_convert_carries_them_and_measures_what_a_dtype_loses(folder: Path, tmp_path: Path) -> None:
    before = Adapter.load(folder)
    convert(folder, tmp_path / "same", "peft")
    after = Adapter.load(tmp_path / "same")
    assert before.biases.keys() == after.biases.keys()
    assert all(torch.equal(after.extras[name], value) for name, value in before.extras.items())
    edit(
        folder, {}, lambda tensors: [value.copy_(value.bfloat16().float()) for name, value in tensors.items() if "lora_" in name]
    )
    with pytest.raises(
        AdapterFileError, match=r"would hold its biases, token rows or modules in full with a relative error of 0\.0"
    ):
        convert(folder, tmp_path / "short", "peft", dtype=torch.bfloat16)
    convert(folder, tmp_path / "short", "peft", dtype=torch.bfloat16, lossy=True)
    rows = Adapter.load(tmp_path / "short").token_rows["transformer.wte"]
    assert isinstance(rows, TokenRows)
    assert rows.rows.dtype == torch.bfloat16
