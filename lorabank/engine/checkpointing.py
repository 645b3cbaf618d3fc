"""transformers' switch for activation checkpointing, under the name that the installed version has for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

_NEW = "activation_checkpointing_enable" in vars(PreTrainedModel)  # the older names warn there, and go in transformers 6


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether any part of the model recomputes its activations in backward."""
    return bool(getattr(model, "is_activation_checkpointing" if _NEW else "is_gradient_checkpointing"))


def enable_checkpointing(model: PreTrainedModel, context_fn: Callable[[], Any]) -> None:
    """Recompute each block in backward, inside the contexts that `context_fn` gives."""
    enable = getattr(model, "activation_checkpointing_enable" if _NEW else "gradient_checkpointing_enable")
    enable({"use_reentrant": False, "context_fn": context_fn})


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations again."""
    getattr(model, "activation_checkpointing_disable" if _NEW else "gradient_checkpointing_disable")()
