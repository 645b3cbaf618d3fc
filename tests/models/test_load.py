"""Loading a folder, and one clear sentence for each folder that isn't a model to adapt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from lorabank.errors import ConfigError, ModelError
from lorabank.models import load_base
from tests.models.conftest import byte_tokenizer, tiny_llama


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def test_a_folder_loads_with_the_weights_it_holds(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base(str(tiny), device="cpu")
    assert (base.name, base.folder, base.dtype, base.device.type) == (str(tiny), tiny, torch.float32, "cpu")
    assert base.has_chat_template
    assert not base.model.training
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, tiny_llama()(ids).logits)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ModelError, match=r"^model: .* can't be a path here"):
        load_base(name)


def test_stored_as_asked(tiny: Path) -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        base = load_base(str(tiny), dtype=name, device="cpu")
        assert base.dtype == dtype
        assert {weight.dtype for weight in base.model.parameters()} == {dtype}


def test_transformers_settings_are_put_back(tiny: Path) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_base(str(tiny), device="cpu")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_base(str(tiny), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_pad_token_is_filled_in_and_kept_when_there_is_one(tiny: Path) -> None:
    base = load_base(str(tiny), device="cpu")
    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "<|im_end|>"
    assert any("no pad token" in note for note in base.notes)
    byte_tokenizer(pad_token="<|endoftext|>").save_pretrained(tiny)
    base = load_base(str(tiny), device="cpu")
    assert base.tokenizer.pad_token == "<|endoftext|>"
    assert base.notes == ()


def test_tied_embeddings_stay_tied(tiny: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tiny)
    model = load_base(str(tiny), device="cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_no_chat_template_is_said_not_refused(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    assert not load_base(str(tiny), device="cpu").has_chat_template


def test_weights_without_a_place_and_tokens_without_a_row_are_noted(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    save_file(weights | {"extra.weight": torch.zeros(2)}, tiny / "model.safetensors", metadata={"format": "pt"})
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tiny)
    notes = " ".join(load_base(str(tiny), device="cpu").notes)
    assert "extra.weight" in notes
    assert "up to id 261" in notes


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def _without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def _run_folder(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "formal").mkdir()
    (folder / "formal" / "adapter_config.json").write_text("{}")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _encoder(folder: Path) -> None:
    config = BertConfig(vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(folder)


def _encoder_decoder(folder: Path) -> None:
    config = T5Config(vocab_size=261, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _no_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("chat*")]:
        path.unlink()


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _pipeline(folder: Path) -> None:
    _only("model_index.json", "unet/config.json")(folder)
    (folder / "config.json").unlink()


def _only(*files: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(b"x")

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "weights can't be read"),
    "garbage": (_garbage, "weights can't be read"),
    "no head": (_without_head, r"files lack 1 of the weights.*lm_head"),
    "pickled": (_pickled, r"pytorch_model.bin is a pickle.*only safetensors.*convert"),
    "no weights": (_only(), "no .safetensors file"),
    "tensorflow": (_only("tf_model.h5"), r"tf_model.h5 is a TensorFlow checkpoint.*PyTorch models only"),
    "tensorflow checkpoint": (_only("model.ckpt.index"), "TensorFlow checkpoint"),
    "saved model": (_only("1/saved_model.pb"), "TensorFlow checkpoint"),
    "keras": (_only("weights.h5"), "Keras checkpoint"),
    "flax": (_only("flax_model.msgpack"), "Flax checkpoint"),
    "onnx": (_only("onnx/model.onnx"), "ONNX checkpoint"),
    "adapter": (_adapter, "LoRA adapter, not a model; its base is 'some/base'"),
    "run folder": (_run_folder, r"looks like a run's output \(it holds adapters: formal\)"),
    "missing shard": (_missing_shard, r"1 of its weight files are missing \(model-00002-of-00002"),
    "pipeline": (_pipeline, r"diffusers pipeline \(model_index.json\).*task text-to-image"),
    "encoder": (_encoder, "BertForMaskedLM is not a model that continues text"),
    "encoder-decoder": (_encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder model.* for task summarization"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer can't be read"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json can't be read"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "should hold a JSON object"),
    "wrong shapes": (_config(hidden_size=64), "weights can't be read"),
    "bad value": (_config(num_hidden_layers="two"), "config.json can't be used"),
    "new architecture": (_config(model_type="llama9"), r"model_type 'llama9'.*pip install -U transformers"),
    "own code": (_config(model_type="mine", auto_map={"AutoConfig": "c.C"}), "trust_remote_code: true"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
    "gguf inside": (_only("m.gguf"), "no .safetensors file"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_gets_one_clear_sentence(case: str, tiny: Path) -> None:
    spoil, message = SPOILED[case]
    spoil(tiny)
    with pytest.raises(ModelError, match=message) as caught:
        load_base(str(tiny), device="cpu")
    assert "tiny-llama" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.h5", "Keras checkpoint"),
        ("model.onnx", "ONNX checkpoint"),
        ("model.pt", "a pickled weight file"),
        ("model.safetensors", "Name the folder that holds it"),
        ("model.gguf", "not a GGUF file"),
    ],
)
def test_a_file_instead_of_a_folder(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not what it says")
    with pytest.raises(ModelError, match=message):
        load_base(str(tmp_path / file), cache=tmp_path / "cache", device="cpu")
    assert not list(tmp_path.glob("cache/models/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp23"}, r"base_dtype: expected one of auto, fp32, bf16, fp16, fp8, nf4, got 'fp23' \(did you mean 'fp32'"),
        ({"device": "cuad"}, r"got 'cuad' \(did you mean 'cuda'"),
        pytest.param({"device": "cuda:97"}, "97' asked for, but", id="a GPU that isn't there, on machines with and without GPUs"),
    ],
)
def test_wrong_dtype_or_device(settings: dict[str, str], message: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_base(str(tiny), **settings)
