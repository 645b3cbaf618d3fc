"""Whether an adapter is of a model that another tool runs at all: what it was trained for, or what its base is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.config.tasks import DEFAULT_TASK
from lorabank.errors import ConfigError

if TYPE_CHECKING:
    from lorabank.formats.adapter import Adapter

TASKS_OF = {"vllm": (DEFAULT_TASK, "text-classification"), "gguf": (DEFAULT_TASK,), "ollama": (DEFAULT_TASK,)}
"""Tool → tasks whose adapters are written for it."""
NAMES = {"vllm": "vLLM", "gguf": "llama.cpp", "ollama": "ollama"}


def check_task(tool: str, adapter: Adapter, base: str | None, where: str) -> None:
    """Raise ConfigError for an adapter of anything but a language model, with what can be done with it instead.

    base: the base's folder or name, where it is known. Adapters that say no task are told by their base's `config.json`.
    """
    from lorabank.training.task import TASK_KEY

    task = adapter.metadata.get(TASK_KEY)
    if task is None and base is not None:
        task = _of_base(Path(base).expanduser(), tool)
    if task is None or task in TASKS_OF[tool]:
        return
    way_out = (
        "`lorabank convert --to kohya` or `--to diffusers` writes it for tools that draw"
        if task == "text-to-image"
        else "`lorabank merge` writes a plain model with it in the weights"
    )
    raise ConfigError(
        f"{where}: is for {task}, and {NAMES[tool]} gets adapters of language models from here ({', '.join(TASKS_OF[tool])}). "
        f"{way_out}."
    )


def _of_base(folder: Path, tool: str) -> str | None:
    """What a base that is no language model is, by the class that its configuration names; None for others, and unknown ones."""
    from transformers.models.auto import modeling_auto as auto

    from lorabank.formats.vllm_experts import model_type_of

    if (folder / "model_index.json").is_file():
        return "text-to-image"
    kind = model_type_of(folder)
    written = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    if tool == "vllm":
        written |= set(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    if kind is None or kind not in auto.MODEL_MAPPING_NAMES or kind in written:
        return None
    return f"a {kind!r} model"
