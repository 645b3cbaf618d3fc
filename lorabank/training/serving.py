"""The commands that a finished run offers: `vllm serve` for its adapters, or why an export comes first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabank.formats.adapter import Adapter
from lorabank.formats.readers import EXPORTED, MERGE, NO_MODULES, VLLM_RANKS, obstacles, rank_obstacle, unread_modules

HEAD = "vLLM reads its head where it runs as a classifier; add --runner pooling --convert classify --max-lora-cls-labels LABELS"
"""Of a classifier whose head was trained in full: the base may be a language model, and is one without these."""


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
        rank = largest_rank(config)
        largest, patterns = max(largest, rank), patterns or has_patterns(config)
        reason = settings_obstacle(config)
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


def folder_obstacle(folder: str | Path) -> str | None:
    """Why vLLM refuses the adapter in a folder; None if it doesn't, or none is there."""
    file = Path(folder) / "adapter_config.json"
    return settings_obstacle(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def largest_rank(config: Mapping[str, Any]) -> int:
    """Of all layers, by PEFT's settings."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def settings_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why vLLM refuses an adapter with these settings of PEFT's; None if it doesn't."""
    return obstacle(
        largest_rank(config),
        use_dora=bool(config.get("use_dora")),
        experts=bool(config.get("target_parameters")),
        extras=config.get("bias", "none") != "none" or bool(config.get("lora_bias") or config.get("trainable_token_indices")),
        modules=config.get("modules_to_save") or (),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def obstacle(
    rank: int,
    *,
    use_dora: bool = False,
    experts: bool = False,
    extras: bool = False,
    modules: Sequence[str] = (),
    transposed: bool = False,
) -> str | None:
    """Why vLLM refuses an adapter; None if it doesn't.

    extras: it has biases or token rows. modules: trained in full. transposed: the base keeps weights as GPT-2 does.
    """
    for there, what in (
        (extras, "vLLM reads no trained biases or token rows"),
        (unread_modules(modules), NO_MODULES),
        (use_dora, "vLLM doesn't read DoRA"),
        (transposed, "vLLM takes no adapters for GPT-2"),
    ):
        if there:
            return f"{what}; {MERGE}"
    if rank > VLLM_RANKS[-1]:
        return f"{rank_obstacle(rank)}; merge it (lorabank merge)"
    if modules:
        return HEAD
    return f"vLLM reads experts one by one; {EXPORTED}" if experts else None


def adapter_obstacle(adapter: Adapter) -> str | None:
    """Why vLLM refuses the adapter; None if it doesn't."""
    found = "; ".join(f"{each.what}; {each.way_out}" for each in obstacles(adapter, "vllm"))
    return found or (HEAD if adapter.modules else None)
