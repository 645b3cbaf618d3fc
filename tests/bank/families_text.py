"""Tiny configurations of families that read and write text: decoders, mixtures of experts, state-space models, encoders, both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import transformers as hf
from torch import nn

from lorabank.bank.stacked.stacks import stacks_of
from tests.bank.family import SIZES, TOKENS, TWO_SIDES, Family, Inputs, built, ids_alone, named, text, text_pair

_KV: Mapping[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT: Mapping[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, **TOKENS}
_GEMMA: Mapping[str, Any] = {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 5}
_SLIDING: Mapping[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_T5: Mapping[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART: Mapping[str, Any] = {"d_model": 16, "decoder_start_token_id": 1, "max_position_embeddings": 64, **TWO_SIDES, **TOKENS}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
_ROUTED: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_DEEP: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
_SSM: Mapping[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_AS_EXPERTS = {"peft": ["gate_proj", "up_proj", "down_proj"]}
"""PEFT 0.21 takes layers of these names for the experts of such models, dense and shared ones too."""
STACKED = "stacked expert weights"


def _decoder(
    name: str, *, config: str = "", kind: str = "decoder", known: Mapping[str, Any] | None = None, **sizes: Any
) -> Family:
    make = built(f"{name}ForCausalLM", config or f"{name}Config", **{**SIZES, **_KV, **TOKENS, **sizes})
    return Family(kind=kind, make=make, inputs=text, **(known or {}))


def _experts(
    name: str, exclude: Sequence[str] = (), left: str = "", more: Mapping[str, Any] | None = None, **sizes: Any
) -> Family:
    return _decoder(name, kind="mixture of experts", known={"exclude": exclude, "left": left, **(more or {})}, **sizes)


def _registered(family: Family) -> Family:
    """Skipped where this transformers keeps the family's experts in a class of its own, as older ones do."""

    def make() -> nn.Module:
        model = family.make()
        if not any(stacks_of(module) for module in model.modules()):
            pytest.skip(f"transformers {hf.__version__} keeps the experts of {type(model).__name__} in a class of its own")
        return model

    return replace(family, make=make)


def _encoder(name: str, head: str = "SequenceClassification", known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return named("encoder", f"{name}For{head}", known=known, **{**SIZES, "max_position_embeddings": 64, **TOKENS, **sizes})


def _both(name: str, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return named("encoder-decoder", f"{name}ForConditionalGeneration", text_pair, known, **{**_BART, **sizes})


def _state_space(name: str, inputs: Inputs = ids_alone, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    base = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **TOKENS}
    return named("state-space", f"{name}ForCausalLM", inputs, known, **{**base, **sizes})


def _hybrid(name: str, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return _decoder(name, kind="state-space", known=known, **sizes)


DECODERS: Mapping[str, Family] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=5),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=4),
    "gemma": _decoder("Gemma", head_dim=4),
    "gemma2": _decoder("Gemma2", **_GEMMA),
    "gemma3": _decoder("Gemma3", config="Gemma3TextConfig", **_GEMMA, layer_types=_SLIDING["layer_types"]),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3", original_max_position_embeddings=64),
    "gpt2": named("decoder", "GPT2LMHeadModel", **_GPT),
    "gpt_bigcode": _decoder("GPTBigCode", **_GPT),
    "gptj": _decoder("GPTJ", **_GPT, rotary_dim=4),
    "codegen": _decoder("CodeGen", **_GPT, rotary_dim=4),
    "gpt_neo": _decoder("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": _decoder("GPTNeoX"),
    "opt": _decoder("OPT", ffn_dim=24, word_embed_proj_dim=8),
    "bloom": _decoder("Bloom", n_layer=2, n_head=4),
    "falcon": _decoder("Falcon"),
    "mpt": named("decoder", "MptForCausalLM", d_model=16, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, **TOKENS),
    "olmo": _decoder("Olmo"),
    "olmo2": _decoder("Olmo2"),
    "stablelm": _decoder("StableLm"),
    "starcoder2": _decoder("Starcoder2"),
    "cohere": _decoder("Cohere"),
    "cohere2": _decoder("Cohere2", **_SLIDING),
    "granite": _decoder("Granite"),
    "glm": _decoder("Glm", head_dim=4),
    "glm4": _decoder("Glm4", head_dim=4),
    "smollm3": _decoder("SmolLM3"),
    "nemotron": _decoder("Nemotron"),
    "persimmon": _decoder("Persimmon"),
    "helium": _decoder("Helium", head_dim=4),
    "ernie4_5": _decoder("Ernie4_5"),
    "exaone4": _decoder("Exaone4", **_SLIDING),
    "seed_oss": _decoder("SeedOss", head_dim=4),
    "arcee": _decoder("Arcee"),
    "minicpm3": _decoder("MiniCPM3", **_LATENT),
}
EXPERTS: Mapping[str, Family] = {
    "mixtral": _experts("Mixtral", num_local_experts=3),
    "qwen2_moe": _experts("Qwen2Moe", **_ROUTED, shared_expert_intermediate_size=8),
    "qwen3_moe": _experts("Qwen3Moe", **_ROUTED, head_dim=4),
    "olmoe": _experts("Olmoe", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _registered(_experts("GraniteMoe", num_local_experts=4, num_experts_per_tok=2)),
    "phimoe": _experts(
        "Phimoe", ("router",), "PhimoeTopKRouter has a forward or weight", num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt_oss": _experts("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=4, **_SLIDING),
    "jetmoe": _experts(
        "JetMoe",
        ("*experts*", "mlp.input_linear", "mlp.output_linear"),
        STACKED,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=4,
    ),
    "deepseek_v2": _experts(
        "DeepseekV2", ["mlp.gate"], "its weight is read and it isn.t called", more=_AS_EXPERTS, **_LATENT, **_DEEP
    ),
    "deepseek_v3": _experts("DeepseekV3", more=_AS_EXPERTS, **_LATENT, **_DEEP),
    "qwen3_next": _experts(
        "Qwen3Next",
        more=_AS_EXPERTS,
        **_ROUTED,
        head_dim=4,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        layer_types=["linear_attention", "full_attention"],
    ),
}
_MAMBA = {"exclude": ["dt_proj"], "left": r"mixer.dt_proj \(its weight is read and it isn't called\)", "peft": ["out_proj"]}
STATE_SPACE: Mapping[str, Family] = {
    "mamba": _state_space("Mamba", known=_MAMBA, time_step_rank=3, use_mambapy=False),
    "falcon_mamba": _state_space("FalconMamba", known=_MAMBA, time_step_rank=3),
    "mamba2": _state_space("Mamba2", known={"peft": ["out_proj"]}, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, expand=2),
    "rwkv": named(
        "state-space",
        "RwkvForCausalLM",
        lambda: {**ids_alone(), "use_cache": False},
        hidden_size=16,
        num_hidden_layers=2,
        attention_hidden_size=16,
        context_length=64,
        vocab_size=61,
    ),
    "jamba": _hybrid(
        "Jamba",
        {"exclude": ["dt_proj"], "left": r"dt_proj \(its weight is read"},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=3,
        use_mamba_kernels=False,
    ),
    "bamba": _hybrid("Bamba", attn_layer_indices=[1], **_SSM),
    "zamba2": _hybrid(
        "Zamba2",
        mamba_d_state=4,
        n_mamba_heads=4,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=4,
        num_mem_blocks=1,
        adapter_rank=2,
        use_mem_rope=False,
        layers_block_type=["mamba", "hybrid"],
    ),
    "lfm2": _hybrid("Lfm2", layer_types=["conv", "full_attention"]),
    "granitemoehybrid": _hybrid(
        "GraniteMoeHybrid", layer_types=["mamba", "attention"], **_SSM, num_local_experts=0, shared_intermediate_size=24
    ),
    "recurrent_gemma": _hybrid(
        "RecurrentGemma",
        {"exclude": ["rg_lru"], "left": "RecurrentGemmaRglru holds 3-D weights of its own"},
        lru_width=16,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        head_dim=4,
    ),
}
_TURNED = r"its input is \(tokens, rows, features\)"
ENCODERS: Mapping[str, Family] = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "xlm-roberta": _encoder("XLMRoberta"),
    "camembert": _encoder("Camembert"),
    "electra": _encoder("Electra", embedding_size=8),
    "albert": _encoder("Albert", embedding_size=8),
    "distilbert": named(
        "encoder",
        "DistilBertForSequenceClassification",
        dim=16,
        hidden_dim=24,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        vocab_size=61,
        pad_token_id=0,
    ),
    "mpnet": _encoder("MPNet"),
    "modernbert": _encoder("ModernBert", cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2),
    "deberta": _encoder(
        "Deberta",
        known={"apart": r"pos_proj.*names 3 rows.*input has 1 "},
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "deberta-v2": _encoder(
        "DebertaV2",
        known={"apart": r"(query|key)_proj.*names 3 rows.*input has 1 "},
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "roformer": _encoder("RoFormer"),
    "ernie": _encoder("Ernie"),
    "megatron-bert": _encoder("MegatronBert"),
    "mobilebert": _encoder("MobileBert", embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    "convbert": _encoder("ConvBert", embedding_size=8, conv_kernel_size=3, head_ratio=2),
    "esm": _encoder(
        "Esm", known={"exclude": ["contact_head.*"], "left": "never called 'esm.contact_head.regression'"}, mask_token_id=3
    ),
    "ibert": _encoder("IBert", known={"targets": ["classifier.*"], "left": "QuantLinear is not supported yet"}),
    "nystromformer": _encoder("Nystromformer", num_landmarks=7, segment_means_seq_len=7),
    "squeezebert": _encoder("SqueezeBert", embedding_size=16),
    "splinter": _encoder("Splinter", "QuestionAnswering"),
    "rembert": _encoder("RemBert", input_embedding_size=8, output_embedding_size=8),
    "xlnet": named(
        "encoder",
        "XLNetForSequenceClassification",
        known={
            "exclude": ["rel_attn"],
            "left": r"XLNetRelativeAttention holds 3-D weights of its own \(q, k, v, o, r, seg_embed\)",
            "apart": _TURNED,
        },
        d_model=16,
        n_layer=2,
        n_head=4,
        d_inner=24,
        **TOKENS,
    ),
    "longformer": _encoder("Longformer", known={"apart": _TURNED}, attention_window=4, sep_token_id=2),
    "big_bird": _encoder("BigBird", attention_type="original_full", sep_token_id=3),
    "funnel": named(
        "encoder",
        "FunnelForSequenceClassification",
        known={"exclude": ["re:.*blocks\\.\\d\\.\\d\\.attention"], "left": "FunnelRelMultiheadAttention holds 3-D weights"},
        d_model=16,
        d_head=4,
        n_head=4,
        d_inner=24,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        vocab_size=61,
    ),
    "fnet": named("encoder", "FNetForSequenceClassification", ids_alone, hidden_size=16, max_position_embeddings=64, **TOKENS),
    "canine": _encoder("Canine", downsampling_rate=2, num_hash_buckets=16, local_transformer_stride=4),
}
ENCODER_DECODERS: Mapping[str, Family] = {
    **{
        name.lower(): named("encoder-decoder", f"{name}ForConditionalGeneration", text_pair, **_T5, **TOKENS)
        for name in ("T5", "MT5", "UMT5")
    },
    "longt5": named("encoder-decoder", "LongT5ForConditionalGeneration", text_pair, **_T5, **TOKENS, local_radius=3),
    "switch_transformers": named(
        "encoder-decoder",
        "SwitchTransformersForConditionalGeneration",
        text_pair,
        {"apart": "an expert gets the tokens of all rows in an order of its own"},
        **_T5,
        **TOKENS,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=2,
        router_jitter_noise=0.0,
    ),
    "bart": _both("Bart"),
    "mbart": _both("MBart"),
    "pegasus": _both("Pegasus"),
    "blenderbot": _both("Blenderbot"),
    "blenderbot-small": _both("BlenderbotSmall"),
    "m2m_100": _both("M2M100"),
    "plbart": _both("PLBart"),
    "marian": named("encoder-decoder", "MarianMTModel", text_pair, **_BART),
    "pegasus_x": _both("PegasusX", num_global_tokens=2, block_size=4),
    "bigbird_pegasus": _both("BigBirdPegasus", attention_type="original_full"),
    "led": _both(
        "LED",
        {"apart": _TURNED, "exclude": ["*_global"], "left": "never called 'led.encoder.layers.0.*query_global'"},
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "nllb-moe": _both(
        "NllbMoe",
        {"apart": "an expert gets the tokens of all rows in an order of its own"},
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        expert_capacity=64,
    ),
    "prophetnet": named(
        "encoder-decoder",
        "ProphetNetForConditionalGeneration",
        text_pair,
        hidden_size=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        decoder_start_token_id=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        **TOKENS,
    ),
    "fsmt": _both("FSMT", {"apart": _TURNED}, langs=["en", "de"], src_vocab_size=61, tgt_vocab_size=61),
}
