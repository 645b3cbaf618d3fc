"""Every kind of adapter that lorabank saves, on tiny dense models: does vLLM take those and refuse those as we say?

Runs in lorabank's environment; `scripts/check_vllm_loads.py` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from held import compare, wanted
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

import lorabank as lb
from lorabank.formats.readers import obstacles
from lorabank.formats.vllm_experts import model_type_of
from lorabank.formats.vllm_families import family_obstacles

SIZES: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 20,
    "num_key_value_heads": 10,
    "vocab_size": 640,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
BASES: Mapping[str, dict[str, Any]] = {
    "llama": {"kind": "llama", "attention_bias": True},
    "tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
    "phi3": {"kind": "phi3"},
    "gpt2": {"kind": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "labelled": {"kind": "llama", "num_labels": 3},
    "headless": {"kind": "llama", "num_labels": 3},
}
"""Bases; `labelled` is a classifier with a head called `score`, `headless` the same without one: a language model for vLLM.

vLLM's CPU attention takes no head below 32.
"""
CASES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        "rslora": {"use_rslora": True},
        "rank320": {"rank": 320, "targets": ["q"]},
        "rank512": {"rank": 512, "targets": ["q"]},
        "rank513": {"rank": 513, "targets": ["q"]},
        "pissa": {"init": "pissa", "targets": ["q"]},
        "olora": {"init": "olora", "targets": ["q"]},
        "gaussian": {"init": "gaussian", "targets": ["q"]},
        "orthogonal": {"init": "orthogonal", "targets": ["q"]},
        "embedding": {"targets": ["embed_tokens", "q_proj"]},
        "head": {"targets": ["lm_head", "q_proj"]},
        "dora": {"use_dora": True},
        "bias": {"bias": "all", "targets": ["q"]},
        "lora_bias": {"lora_bias": True, "targets": ["q"]},
        "rows": {"trainable_token_indices": [3, 4], "targets": ["q"]},
        "saved_head": {"modules_to_save": ["lm_head"], "targets": ["q"]},
        "saved_norm": {"modules_to_save": ["norm"], "targets": ["q"]},
    },
    "tied": {
        "plain": {},
        "embedding": {"targets": ["embed_tokens", "q_proj"]},
        "head": {"targets": ["lm_head", "q_proj"]},
        "both_ends": {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    },
    "qwen2": {"plain": {}, "embedding": {"targets": ["embed_tokens", "q_proj"]}, "head": {"targets": ["lm_head", "q_proj"]}},
    "phi3": {"fused": {}, "slices": {"targets": ["q", "v", "mlp"]}},
    "gpt2": {"plain": {}},
    "headless": {"saved": {"modules_to_save": ["score"]}},
    "labelled": {"unsaved": {"modules_to_save": []}, "saved": {"modules_to_save": ["score"]}},
}


def base_of(name: str) -> Any:
    """The base, with numbers that differ everywhere."""
    torch.manual_seed(0)
    own = dict(BASES[name])
    config = CONFIG_MAPPING[own.pop("kind")](**{**({} if name == "gpt2" else SIZES), **own})
    made = AutoModelForSequenceClassification if "num_labels" in own else AutoModelForCausalLM
    return made.from_config(config).eval()


def make(name: str, work: Path) -> None:
    """The base's folder and one of each case's adapter."""
    base = base_of(name)
    if name == "headless":
        language = AutoModelForCausalLM.from_config(base.config)
        language.model.load_state_dict(base.model.state_dict())
        base = language
    base.save_pretrained(work / name / "base")
    for case, settings in CASES[name].items():
        bank = lb.attach(base_of(name))
        bank.add("a", lb.AdapterConfig(**{"rank": 4, "alpha": 6, "targets": "all-linear", **settings}))
        with torch.no_grad():
            for parameter in bank.parameters("a"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        bank.adapter("a").save(work / name / case)


def check(name: str, work: Path) -> dict[str, Any]:
    """Of each case what we say, what vLLM said, and what it held where it took it."""
    report = json.loads((work / name / "held" / "report.json").read_text("utf-8"))
    found: dict[str, Any] = {}
    for case in CASES[name]:
        adapter = lb.Adapter.load(work / name / case)
        ours = [*obstacles(adapter, "vllm"), *family_obstacles(adapter, model_type_of(work / name / "base"))]
        message = report["refused"] or report["messages"][case]
        entry: dict[str, Any] = {"ours": "; ".join(map(str, ours)) or None, "message": message, "held": None}
        if message is None:
            entry["held"] = compare(wanted(base_of(name), adapter), work / name / "held" / f"{case}.safetensors")
        if case in report["answers"]:
            entry["farthest_probability"] = farthest_answer(name, adapter, report)
        found[case] = entry
    return found


def farthest_answer(name: str, adapter: lb.Adapter, report: Mapping[str, Any]) -> float:
    """Between vLLM's probabilities of a classifier's labels and the bank's, for the adapter and a base with a head."""
    bank = lb.attach(base_of(name))
    bank.load("a", adapter)
    case = next(case for case, found in CASES[name].items() if found["modules_to_save"] == sorted(adapter.modules))
    ids = torch.tensor([report["prompt"]] * 2)
    with torch.no_grad(), bank.route([lb.BASE, "a"]):
        ours = bank.model(ids).logits.softmax(-1)
    base = report["answers"]["base"] if name == "labelled" else ours[0].tolist()  # what vLLM makes up for a head says nothing
    theirs = torch.tensor([base, report["answers"][case]])
    return float((ours - theirs).abs().max())
