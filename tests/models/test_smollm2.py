"""The model that `make quickstart` uses: fetched, converted, and answering sensibly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from lorabank.errors import ModelError
from lorabank.models import LoadedBase, load_base, smollm2
from lorabank.models.cache import cache_from_environment


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return load_base("SmolLM2-135M-Instruct", dtype="fp32", device="cpu", cache=cache_from_environment(os.environ))


def test_it_answers(base: LoadedBase) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    batch = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = base.model.generate(**batch, max_new_tokens=12, do_sample=False)
    text = base.tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


def test_it_models_english(base: LoadedBase) -> None:
    """2.98 nats a token on the licence's first 384 tokens; with heads permuted the wrong way it is above 5."""
    text = " ".join((Path(__file__).parents[2] / "LICENSE").read_text().split())
    ids = base.tokenizer(text, return_tensors="pt").input_ids[:, :384]
    with torch.no_grad():
        assert base.model(ids, labels=ids).loss.item() < 3.2


def test_its_settings_are_the_originals(base: LoadedBase) -> None:
    config = base.model.config
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.rms_norm_eps, config.max_position_embeddings, config.tie_word_embeddings) == (1e-05, 8192, True)
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert base.model.generation_config.eos_token_id == 2
    assert sum(weight.numel() for weight in base.model.parameters()) == 134_515_008


def test_its_chat_template_is_chatml_with_a_default_system_turn(base: LoadedBase) -> None:
    tokenizer = base.tokenizer
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert said == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_its_tokenizer_splits_digits_and_keeps_special_tokens_whole(base: LoadedBase) -> None:
    assert base.tokenizer.tokenize("a  12<|im_end|>") == ["a", "ĠĠ", "1", "2", "<|im_end|>"]
    text = "Well , it 's\n 12  cafés ▁ 東京"
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text
    assert base.tokenizer("hello").input_ids == [28120]  # no begin token is put in front


def test_a_second_load_takes_seconds(base: LoadedBase) -> None:
    started = time.perf_counter()
    load_base(base.name, dtype="fp32", device="cpu", cache=cache_from_environment(os.environ))
    assert time.perf_counter() - started < 30


def test_a_tampered_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / smollm2.SOURCE.module
    package.mkdir()
    (package / "__init__.py").touch()
    (package / smollm2.SOURCE.part).write_bytes(b"GGUF and something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="another content than expected"):
        smollm2.smollm2_folder(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
