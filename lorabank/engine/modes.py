"""The base model's mode in a step, and back again: deterministic, with activation checkpointing as asked.

The base's own dropout would give a row other numbers in a joint batch than alone. transformers, however, checkpoints a block only
while the block itself is in training mode, and some blocks (BART's, OPT's) draw their dropout right there. So only the blocks are
put into training mode, with their own dropout probabilities at zero; everything below them evaluates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorabank.bank.bank import AdapterBank
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.offload import Offload
from lorabank.errors import ConfigError

_ABSENT = object()


class _Attributes:
    """Instance attributes of modules, set for a while. They go past `train()`, whose overrides may do more than set a flag."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, module: object, name: str, value: object) -> None:
        own = vars(module)
        self._before.append((own, name, own.get(name, _ABSENT)))
        own[name] = value

    def restore(self) -> None:
        for own, name, value in reversed(self._before):
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value
        self._before.clear()


@contextlib.contextmanager
def step_mode(
    bank: AdapterBank, *, gradient_checkpointing: bool, base_dropout: bool, offload: Offload | None = None
) -> Iterator[None]:
    """Evaluation mode (training mode with `base_dropout`) for the base, checkpointing as asked; all restored afterwards.

    `offload`: where what checkpointing keeps goes; None: it stays on the device.

    Normalisation always uses its running statistics, which belong to the frozen base. Raises ConfigError where that is
    impossible, and where checkpointing can't be switched on.
    """
    modules = list(bank.model.modules())
    attributes = _Attributes()
    try:
        for module in modules:
            normalises = isinstance(module, _NormBase)
            if isinstance(module, _BatchNorm) and module.running_mean is None and not base_dropout:
                _refuse_batch_statistics(bank.model, module)
            if module.training != (base_dropout and not normalises):
                attributes.set(module, "training", not module.training)
        blocks = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        if gradient_checkpointing:
            _checkpoint(blocks, bank, attributes, base_dropout, offload)
        else:
            for block in blocks:
                if block.gradient_checkpointing:
                    attributes.set(block, "gradient_checkpointing", False)
        yield
    finally:
        attributes.restore()


@contextlib.contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode for `modules` (`model.modules()`), restored afterwards."""
    attributes = _Attributes()
    try:
        for module in modules:
            if module.training:
                attributes.set(module, "training", False)
        yield
    finally:
        attributes.restore()


@contextlib.contextmanager
def no_random_draws(device: torch.device, hint: str) -> Iterator[None]:
    """Raise ConfigError when the code inside draws from torch's global generators: a base that does isn't deterministic."""
    before = _generator_states(device)
    yield
    if not all(torch.equal(a, b) for a, b in zip(before, _generator_states(device), strict=True)):
        raise ConfigError(
            f"the base model draws random numbers in its forward pass although it isn't in training mode{hint}, so an adapter "
            "trained jointly would differ from the same one trained alone. Set that dropout (or noise) to 0 in the model's "
            "configuration, or allow it with base_dropout=True."
        )


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _checkpoint(
    blocks: list[GradientCheckpointingLayer],
    bank: AdapterBank,
    attributes: _Attributes,
    base_dropout: bool,
    offload: Offload | None,
) -> None:
    if not blocks:
        raise ConfigError(
            f"gradient_checkpointing: {type(bank.model).__name__} has no blocks that transformers can recompute. Leave it out, "
            "or use torch.utils.checkpoint in the model's own forward, with context_fn=bank.checkpoint_context."
        )
    recompute: Callable[..., Any] = partial(
        checkpoint, use_reentrant=False, context_fn=bank.checkpoint_context, preserve_rng_state=base_dropout
    )
    if offload is not None:
        offload.start()
        recompute = offload.around(recompute)
    for block in blocks:
        if isinstance(block._compiled_call_impl, FusedBlock):
            # around the compiled code, which would otherwise have to see through the checkpoint
            attributes.set(block._compiled_call_impl, "recompute", True)
            attributes.set(block._compiled_call_impl, "offload", offload)
            continue
        attributes.set(block, "_gradient_checkpointing_func", recompute)
        attributes.set(block, "gradient_checkpointing", True)
        attributes.set(block, "training", True)
        if not base_dropout:
            for name in [key for key, value in vars(block).items() if "drop" in key and isinstance(value, float)]:
                attributes.set(block, name, 0.0)


def _refuse_batch_statistics(model: nn.Module, layer: nn.Module) -> None:
    path = next(name for name, module in model.named_modules() if module is layer)
    raise ConfigError(
        f"layer {path!r} ({type(layer).__name__}) keeps no running statistics, so each row's output depends on the other rows of "
        "its batch and adapters trained jointly would disturb one another. Allow it with base_dropout=True."
    )
