"""The commands that a finished run offers: `vllm serve` for its adapters, or why an export comes first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorabank.formats.readers import VLLM_RANKS, rank_obstacle


def chat_line(output: str, names: Sequence[str]) -> str:
    """`lorabank chat OUT --adapters a,b,base`."""
    return shlex.join(["lorabank", "chat", output, "--adapters", ",".join(names)])


def vllm_line(model: str, folders: Mapping[str, str], largest_rank: int) -> str:
    """The full `vllm serve` line for adapters of at most `largest_rank` (which vLLM must accept: see `serve_lines`)."""
    limit = next(rank for rank in VLLM_RANKS if rank >= largest_rank)
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    return shlex.join(["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(limit), "--lora-modules", *modules])


def serve_lines(model: str, folders: Mapping[str, str]) -> tuple[str, list[str]]:
    """A title and the lines below it: the command where vLLM reads every adapter rightly, else what stands in the way."""
    obstacles, largest, patterns = [], 1, False
    for name, folder in folders.items():
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        largest, patterns = max(largest, rank), patterns or has_patterns(config)
        more = config.get("bias") != "none" or config.get("lora_bias") or config.get("trainable_token_indices")
        reason = obstacle(
            rank, use_dora=bool(config.get("use_dora")), experts=bool(config.get("target_parameters")), extras=bool(more)
        )
        if reason:
            obstacles.append(f"{name}: {reason}")
    if obstacles:
        return "vLLM can't serve these adapters as they are:", obstacles
    line = vllm_line(model, folders, largest)
    if not patterns:
        return "serve them in one process:", [line]
    return (
        "serve them in one process (rank and alpha differ between layers: vLLM 0.32 reads that; an older one reads what the "
        "lines below it write):",
        [line, *map(export_line, folders.values())],
    )


def export_line(folder: str) -> str:
    """`lorabank export` into what every vLLM reads."""
    return shlex.join(["lorabank", "export", folder, "--to", "vllm", "--output", f"{folder}-vllm"])


def has_patterns(config: Mapping[str, object]) -> bool:
    """Whether rank or alpha differ between layers."""
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def obstacle(rank: int, *, use_dora: bool = False, experts: bool = False, extras: bool = False) -> str | None:
    """Why vLLM refuses an adapter of this rank, or DoRA's, one on experts, or with biases or token rows; None if it doesn't."""
    if extras:
        return "vLLM reads no trained biases or token rows; merge it (lorabank merge) and serve the merged model"
    if experts:
        return "experts aren't exported for vLLM; merge it (lorabank merge) and serve the merged model"
    if use_dora:
        return "vLLM doesn't read DoRA; merge it (lorabank merge) and serve the merged model"
    return f"{rank_obstacle(rank)}; merge it (lorabank merge)" if rank > VLLM_RANKS[-1] else None
