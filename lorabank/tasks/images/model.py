"""Calling a classifier of any library, and finding its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.in_full.heads import head_paths
from lorabank.bank.wrapping import unwrapped
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import ConfigError, ModelError, Setting


def logits_of(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """(N, labels) in fp32: what the model returns, or its `.logits`. Raises ModelError for anything else."""
    found: Any = model(pixels_NCHW)
    logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels_NCHW):
        got = f"a tensor of {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(found).__name__
        raise ModelError(
            f"{type(model).__name__}: expected a tensor of (pictures, labels), or an output with one as .logits, got {got} for "
            f"{len(pixels_NCHW)} pictures."
        )
    return logits.float()


def find_head(model: nn.Module, height: int, width: int) -> str | None:
    """Path of the linear layer whose output is what the model returns; None for a class of transformers that says itself.

    Found by a forward pass. Raises ConfigError where no linear layer gives the model's output: it must be named then.
    """
    if head_paths(model):
        return None
    outputs: dict[str, Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if type(unwrapped(module)) is nn.Linear and path:

            def note(layer: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                outputs.pop(path, None)
                outputs[path] = output

            hooks.append(module.register_forward_hook(note))
    first = next(model.parameters())
    try:
        with torch.no_grad(), evaluation_mode(model.modules()):
            logits = logits_of(model, torch.zeros(1, 3, height, width, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    same = [path for path, y in outputs.items() if y.shape == logits.shape and torch.equal(y.float(), logits)]
    if not same:
        last = list(outputs)[-3:]
        raise ConfigError(
            Setting("images.head"),
            f": {type(model).__name__} returns what no linear layer of it gave, so its head isn't known. Name the module "
            f"that gives a number a label (its last linear layers: {', '.join(last) or 'none'}).",
        )
    return same[-1]
