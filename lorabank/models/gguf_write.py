"""A transformers model as a GGUF file, for the families whose settings and tensors are known here; others are refused by name.

Numbers stay in the model's dtype. Names are the gguf library's; rows of q and k as in `formats/gguf_base.py`. What was written
is compared with transformers in llama.cpp by `scripts/check_llama_cpp.py folder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabank.errors import ModelError
from lorabank.formats.gguf_adapter import write_whole
from lorabank.formats.gguf_base import ARCHITECTURES, GgufBase, interleaved, require_gguf
from lorabank.formats.gguf_experts import PARTS
from lorabank.models.gguf_tokenizer import add_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""transformers' `model_type` of what can be written."""
CONVERTER = "Use llama.cpp's converter: python convert_hf_to_gguf.py FOLDER."


def write_model_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, file: Path, *, where: str) -> None:
    """Write `model`, whose tokenizer's files are in `folder`, to `file`, whole or not at all.

    Raises ModelError for a family, a position embedding or a tokenizer that isn't known; OutputError.
    """
    require_gguf()
    import gguf

    config: Any = model.config
    check_family(config.model_type, where=where)
    _check_way(config, where)
    architecture = ARCHITECTURES[config.model_type]
    base = GgufBase(
        name=where,
        architecture=architecture,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )
    rows = len(model.get_input_embeddings().get_parameter("weight"))

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, architecture)
        _add_settings(writer, config)
        add_tokenizer(writer, folder, tokenizer, rows, where=where)
        for name, value in _tensors(model, base, where):
            _add_tensor(writer, name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(file, write)


def check_family(model_type: str | None, *, where: str) -> None:
    """Raise ModelError for a family that isn't known here."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"{where}: how a {model_type!r} model is written as GGUF isn't known here (known: {', '.join(FAMILIES)}). Merge it "
            f"(lorabank merge), or name its own GGUF file with --base. {CONVERTER}"
        )


def _check_way(config: Any, where: str) -> None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{where}: its positions are of the kind {kind!r}, which isn't written here. {CONVERTER}")
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        raise ModelError(
            f"{where}: norm_topk_prob is false, and llama.cpp always normalises the weights of a Qwen3 mixture's experts, so it "
            "would compute something else. Serve it with another tool."
        )
    if config.model_type == "qwen3_moe" and config.mlp_only_layers:
        raise ModelError(f"{where}: some of its blocks have no experts, which isn't written here. {CONVERTER}")


def _add_settings(writer: Any, config: Any) -> None:
    import gguf

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tensors(model: PreTrainedModel, base: GgufBase, where: str) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and numbers of all weights."""
    config: Any = model.config
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):  # a stack of experts
            stem, suffix = name, "weight"
        owner, _, last = stem.rpartition(".")
        split = PARTS[last] if last in PARTS and value.ndim == 3 else (last,)
        for part, numbers in zip(split, value.chunk(len(split), 1) if len(split) > 1 else (value,), strict=True):
            found = base.tensor_name(f"{owner}.{part}" if owner else part)
            if found is None:
                raise ModelError(f"{where}: llama.cpp has no place for {name!r}, so this isn't the model that it takes it for.")
            heads = base.heads_of(found)
            yield f"{found.removesuffix('.weight')}.{suffix}", numbers if heads is None else interleaved(numbers, heads)


def _llama3_factors(config: Any) -> Tensor:
    """By what each frequency is divided: plain frequencies over those of Llama 3's rule, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def _add_tensor(writer: Any, name: str, value: Tensor) -> None:
    import gguf

    value = value.detach().to("cpu").contiguous()
    kinds = {torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else kinds.get(value.dtype, "F32")]
    writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
