"""A GGUF file written here answers as the model that it was written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lorabank.errors import ModelError
from lorabank.models import load_base
from tests.models.conftest import CHAT_TEMPLATE, SPECIALS, byte_tokenizer, tiny_llama

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """q and k as llama.cpp keeps them: the two halves of each head's rotary pairs alternate."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, quantized: bool = False, architecture: str = "llama", pre: str = "smollm") -> None:
    model = tiny_llama()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocab = byte_tokenizer().get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(["Ġ Ġ", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        block = module.split(".")[2] if module.startswith("model.layers") else None
        stem = NAMES[module if block is None else module.split(".", 3)[3]]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stem)
        values = np.ascontiguousarray((weight if heads is None else interleaved(weight, heads)).numpy())
        full = f"{stem}.weight" if block is None else f"blk.{block}.{stem}.weight"
        if quantized and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(full, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_same_logits_as_the_original(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    said: list[str] = []
    base = load_base(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", device="cpu", say=said.append)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(base.model(ids).logits, tiny_llama()(ids).logits, rtol=1e-5, atol=1e-6)
    assert said == ["converting tiny.gguf to safetensors, once ..."]
    assert capfd.readouterr() == ("", "")


def test_settings_and_tokenizer_come_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    base = load_base(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", device="cpu")
    config, original = base.model.config, tiny_llama().config
    assert getattr(config, "quantization_config", None) is None
    assert config.rms_norm_eps == original.rms_norm_eps
    assert config.rope_parameters["rope_theta"] == original.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings is False
    assert (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id) == (1, 2, 2)
    assert base.tokenizer.chat_template == CHAT_TEMPLATE
    assert base.tokenizer.model_max_length == original.max_position_embeddings
    text = "<|im_start|>a  12 b , it 's ▁"  # not tidied up, nor taken for another tokenizer's space
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text
    assert base.tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]  # plain GPT-2 splitting gives Ġ Ġ 1
    assert any("dequantized to fp32 from tiny.gguf (F32)" in note for note in base.notes)


def test_a_quantized_file_is_dequantized_exactly(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", quantized=True)
    base = load_base(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", device="cpu")
    weight = tiny_llama().state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    found = base.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, torch.from_numpy(expected))
    assert not torch.equal(found, torch.from_numpy(weight))


def test_converted_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file)
    first = load_base(str(file), cache=cache, device="cpu").folder
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    again = load_base(str(file), cache=cache, device="cpu").folder
    assert (again, (again / "model.safetensors").stat().st_mtime_ns) == (first, stamp)
    write_gguf(file, quantized=True)
    assert load_base(str(file), cache=cache, device="cpu").folder != first


def test_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    for length in (len(whole) // 2, 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"tiny\.gguf.*(damaged|can't read)"):
            load_base(str(file), cache=tmp_path / "cache", device="cpu")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_an_architecture_that_transformers_can_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", architecture="rwkv6")
    with pytest.raises(ModelError, match=r"can't read this GGUF \('rwkv6'.*safetensors release"):
        load_base(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", device="cpu")
