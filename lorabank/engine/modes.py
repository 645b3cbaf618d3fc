"""The base model's mode in a training step, and what it was before (trap: its own dropout would break joint training).

Inside `step_mode` the base is deterministic: dropout off, normalisation on running statistics. Activation checkpointing of
transformers' models is switched on through its public call, with the route carried into recomputation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorabank.bank.bank import AdapterBank
from lorabank.engine.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing
from lorabank.errors import ConfigError


@contextlib.contextmanager
def step_mode(bank: AdapterBank, *, gradient_checkpointing: bool, base_dropout: bool) -> Iterator[None]:
    """Evaluation mode (or training mode with `base_dropout`) for the base, checkpointing as asked; all restored afterwards."""
    model = bank.model
    was_training = {module: module.training for module in model.modules()}
    was_checkpointing = isinstance(model, PreTrainedModel) and is_checkpointing(model)
    model.train(base_dropout)
    _set_checkpointing(bank, gradient_checkpointing)
    try:
        yield
    finally:
        if gradient_checkpointing != was_checkpointing:
            _set_checkpointing(bank, was_checkpointing)
        for module, training in was_training.items():
            module.training = training


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored afterwards."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _set_checkpointing(bank: AdapterBank, on: bool) -> None:
    model = bank.model
    if not isinstance(model, PreTrainedModel):
        if on:
            raise ConfigError(
                f"gradient_checkpointing: {type(model).__name__} is no transformers model, so lorabank can't switch it on. "
                "Use torch.utils.checkpoint in its forward, with context_fn=bank.checkpoint_context."
            )
        return
    if on:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"gradient_checkpointing: {type(model).__name__} doesn't support it; leave it out")
        enable_checkpointing(model, bank.checkpoint_context)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the flag alone: transformers checkpoints only layers in training mode
    elif is_checkpointing(model):
        disable_checkpointing(model)
