"""`save_state` and `load_state`: everything about the adapters that a resumed run needs, as tensors and plain values.

No files here: a checkpoint writes them, a remote API could send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.errors import CheckpointError
from lorabank.optim.slot_optimizer import SlotOptimizer


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """A snapshot: copies on the CPU, apart from the living bank."""

    tensors: Mapping[str, Tensor]
    """`<adapter>/param/<leaf>`, `<adapter>/optim/<leaf>.<state>`, `<adapter>/grad/<leaf>` (of a step under way)."""
    values: Mapping[str, Any]
    """Adapter to {"steps": optimizer steps}; JSON-able."""


def save_state(bank: AdapterBank, optimizer: SlotOptimizer) -> EngineState:
    """Copy parameters, optimizer state and pending gradients of every adapter that the optimizer trains."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name in optimizer.names:
        step, state = optimizer.state(name)
        values[name] = {"steps": step}
        for key, leaf in bank.named_parameters(name):
            tensors[f"{name}/param/{key}"] = leaf.detach().to("cpu", copy=True)
            if leaf.grad is not None:
                tensors[f"{name}/grad/{key}"] = leaf.grad.to("cpu", copy=True)
        for key, tensor in state.items():
            tensors[f"{name}/optim/{key}"] = tensor.to("cpu", copy=True)
    return EngineState(tensors=tensors, values=values)


def load_state(bank: AdapterBank, optimizer: SlotOptimizer, state: EngineState) -> None:
    """Put a snapshot back into a bank and optimizer with the same adapters. Raises CheckpointError before changing anything."""
    if set(state.values) != set(optimizer.names):
        raise CheckpointError(f"the checkpoint has adapters {sorted(state.values)}, this run has {sorted(optimizer.names)}")
    for name in optimizer.names:
        for key, leaf in bank.named_parameters(name):
            saved = state.tensors.get(f"{name}/param/{key}")
            if saved is None or saved.shape != leaf.shape:
                got = "none" if saved is None else str(tuple(saved.shape))
                raise CheckpointError(f"checkpoint: adapter {name!r}, {key}: expected shape {tuple(leaf.shape)}, got {got}")
    for name in optimizer.names:
        part = {kind: _under(state.tensors, f"{name}/{kind}/") for kind in ("param", "grad", "optim")}
        with torch.no_grad():
            for key, leaf in bank.named_parameters(name):
                leaf.copy_(part["param"][key])
                leaf.grad = part["grad"][key].to(leaf.device, copy=True) if key in part["grad"] else None
        optimizer.load_state(name, int(state.values[name]["steps"]), part["optim"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
