"""Adapters of stacked experts in vLLM: a tiny random mixture of each family, and what vLLM holds of its adapter beside ours.

Runs in lorabank's environment; `scripts/check_vllm_loads.py` calls it. Compared is every weight that vLLM adapts: the experts'
own with transformers', and its change with the adapter's ΔW; one that the adapter leaves alone with zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from held import compare, wanted
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lorabank as lb
from lorabank.formats.vllm import vllm_adapter

WIDTH, INNER, EXPERTS = 128, 96, 4
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 261,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "head_dim": WIDTH // 4,
}
SHARED: dict[str, Any] = {"n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        **SHARED,
    },
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "exaone_moe": {"num_experts": EXPERTS, "mlp_layer_types": ["sparse", "sparse"], **SHARED},
    "glm4_moe": {"n_routed_experts": EXPERTS, **SHARED},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "minimax_m2": {"num_local_experts": EXPERTS, "rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "qwen2_moe": {"shared_expert_intermediate_size": 64, "num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "qwen3_next": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 64},
}
"""What a family's configuration needs beside `SIZES`. A head of 32: vLLM's CPU attention takes no smaller one."""


def make(kind: str, work: Path) -> None:
    """The base's folder, an adapter on every linear map of every block, with ranks and scalings that differ, and its export."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind]})).eval()
    with torch.no_grad():  # a router of tiny weights takes experts by rounding
        for name, parameter in model.named_parameters():
            parameter.mul_(20.0 if name.endswith("mlp.gate.weight") else 2.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(work / kind / "base")
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=4, alpha=6, rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 3}))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_(std=0.2)
    adapter = bank.adapter("a")
    bank.detach()
    adapter.save(work / kind / "adapter")
    vllm_adapter(adapter, model_type=kind, where=kind).save(work / kind / "exported")


def check(kind: str, work: Path) -> dict[str, Any]:
    """What vLLM said to the export and to the folder as it is, and what it held of those that it took."""
    base = AutoModelForCausalLM.from_pretrained(work / kind / "base", dtype=torch.float32)
    known = wanted(base, lb.Adapter.load(work / kind / "adapter"))
    found: dict[str, Any] = {}
    for run in ("held", "mixed"):
        if not (work / kind / run).is_dir():
            continue
        report = json.loads((work / kind / run / "report.json").read_text("utf-8"))
        for name, message in report["messages"].items():
            held = compare(known, work / kind / run / f"{name}.safetensors") if message is None else None
            found[f"{name}{', mixed formats' if run == 'mixed' else ''}"] = {"message": message, "held": held}
    return found
