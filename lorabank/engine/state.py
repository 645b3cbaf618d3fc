"""`save_state` and `load_state`: everything about the adapters that a resumed run needs, as tensors and plain values.

No files here: a checkpoint writes them, a remote API could send them. Dropout needs nothing of its own: its masks are functions
of the adapter's step count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.engine.loss_scale import LossScales
from lorabank.errors import CheckpointError
from lorabank.optim.slot_optimizer import SlotOptimizer

KINDS = ("param", "grad", "optim", "frozen")


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """A snapshot: copies on the CPU, apart from the living bank."""

    tensors: Mapping[str, Tensor]
    """`<adapter>/param/<leaf>`, `<adapter>/optim/<leaf>.<state>`, `<adapter>/grad/<leaf>` (of a step under way), and
    `<adapter>/frozen/<leaf>`, where an adapter started whose change is the difference from there."""
    values: Mapping[str, Any]
    """Adapter to {"steps": optimizer steps, "rule": its optimizer, "loss_scale": for a base in fp16, "ids": leaf of token rows to
    the ids that they are of}; JSON-able."""


def save_state(bank: AdapterBank, optimizer: SlotOptimizer, loss_scales: LossScales | None = None) -> EngineState:
    """Copy parameters, optimizer state and pending gradients of every adapter that the optimizer trains.

    `loss_scales`: the engine's, which matter for a base in fp16.
    """
    scales = {} if loss_scales is None else loss_scales.state()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name in optimizer.names:
        step, state = optimizer.state(name)
        values[name] = {"steps": step, "rule": optimizer.config(name).rule}
        if name in scales:
            values[name]["loss_scale"] = list(scales[name])
        if ids := _token_ids(bank, name):
            values[name]["ids"] = ids
        for key, leaf in bank.named_parameters(name):
            tensors[f"{name}/param/{key}"] = leaf.detach().to("cpu", copy=True)
            if leaf.grad is not None:
                tensors[f"{name}/grad/{key}"] = leaf.grad.to("cpu", copy=True)
        for key, tensor in bank.frozen_tensors(name):
            tensors[f"{name}/frozen/{key}"] = tensor.to("cpu", copy=True)
        for key, tensor in state.items():
            tensors[f"{name}/optim/{key}"] = tensor.to("cpu", copy=True)
    return EngineState(tensors=tensors, values=values)


def load_state(bank: AdapterBank, optimizer: SlotOptimizer, state: EngineState, loss_scales: LossScales | None = None) -> None:
    """Put a snapshot back into a bank and optimizer with the same adapters. Raises CheckpointError before changing anything."""
    if set(state.values) != set(optimizer.names):
        raise CheckpointError(f"the checkpoint has adapters {sorted(state.values)}, this run has {sorted(optimizer.names)}")
    parts = {name: {kind: _under(state.tensors, f"{name}/{kind}/") for kind in KINDS} for name in optimizer.names}
    for name, part in parts.items():
        rule = state.values[name].get("rule")
        if rule != optimizer.config(name).rule:
            raise CheckpointError(
                f"checkpoint: adapter {name!r} was trained with {rule}, this run has {optimizer.config(name).rule}"
            )
        _check_leaves(bank, name, part)
        _check_ids(bank, name, state.values[name])
        optimizer.check_state(name, int(state.values[name]["steps"]), part["optim"])
    for name, part in parts.items():
        with torch.no_grad():
            for key, leaf in bank.named_parameters(name):
                leaf.copy_(part["param"][key])
                leaf.grad = part["grad"][key].to(leaf.device, copy=True) if key in part["grad"] else None
            for key, tensor in bank.frozen_tensors(name):
                tensor.copy_(part["frozen"][key])
        optimizer.load_state(name, int(state.values[name]["steps"]), part["optim"])
    if loss_scales is not None:
        loss_scales.load({name: values["loss_scale"] for name, values in state.values.items() if "loss_scale" in values})


def _check_leaves(bank: AdapterBank, name: str, part: Mapping[str, Mapping[str, Tensor]]) -> None:
    leaves = {key: leaf.shape for key, leaf in bank.named_parameters(name)}
    frozen = {key: tensor.shape for key, tensor in bank.frozen_tensors(name)}
    for kind, shapes in (("param", leaves), ("grad", leaves), ("frozen", frozen)):
        saved = part[kind]
        missing = set() if kind == "grad" else shapes.keys() - saved.keys()
        wrong = sorted(missing | (saved.keys() - shapes.keys())) or sorted(k for k in saved if saved[k].shape != shapes[k])
        if wrong:
            key = wrong[0]
            expected = tuple(shapes[key]) if key in shapes else "none"
            got = tuple(saved[key].shape) if key in saved else "none"
            raise CheckpointError(f"checkpoint: adapter {name!r}, {kind} {key}: expected shape {expected}, got {got}")


def _token_ids(bank: AdapterBank, name: str) -> dict[str, list[int]]:
    return {key: list(ids) for key, ids in bank.token_ids(name).items()}


def _check_ids(bank: AdapterBank, name: str, values: Mapping[str, Any]) -> None:
    """Rows have no mark of whose they are: as many of other ids would be taken for these."""
    saved: Mapping[str, list[int]] = values.get("ids", {})
    for key, ids in _token_ids(bank, name).items():
        if key in saved and list(saved[key]) != ids:
            raise CheckpointError(
                f"checkpoint: adapter {name!r}, {key}: its rows are of other token ids ({_shown(saved[key])}) than this "
                f"adapter's ({_shown(ids)}). Add the adapter with the ids, and their order, that it was trained with "
                "(trainable_token_indices)."
            )


def _shown(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:4])) + (" …" if len(ids) > 4 else "")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
