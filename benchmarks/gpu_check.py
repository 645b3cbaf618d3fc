"""Correctness before speed: our compiled path beside PEFT's on a cut model, and a joint pass beside single ones.

How far two right bf16 paths may differ isn't guessed but measured: PEFT's bf16 gradient of each leaf lies at some distance from
PEFT's gradient in fp32, on the same weights, adapters and rows. Ours may differ from PEFT's bf16 gradient by FACTOR times that:
two independent paths of equal error differ by √2 times it, in the worst case by twice.

A base in 4 bits is compared with a bf16 base whose weights are what the codes stand for: what is left is rounding again. fp8
rounds activations too, to which no bf16 base corresponds, so there only the direction of the gradient is looked at.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from gpu_model import ALPHA, TARGETS, Shape, Training, Work, as_batch, free, llama, quantized, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorabank as lb
from lorabank.bank.kinds import layer_kind

FACTOR = 3.0
"""See above."""
LOOSEST = 0.25
"""Beyond this relative distance of a gradient the check fails whatever PEFT's own error is."""
FINEST = 1e-4
"""A distance below this is rounding in any dtype."""
LOSS = 1e-3
"""Relative difference of two losses: 8 bits of rounding in each logit, averaged over the tokens."""
STORAGE_COSINE, STORAGE_LOSS = 0.9, 0.01
"""fp8 rounds weights and activations, so its whole gradient need only point where bf16's does. Quality is measured elsewhere."""
FOUR_BITS = ("nf4",)
ADAPTERS, TOKENS, RANK = 8, 128, 16
ROWS = 2
"""Of each adapter: code that is compiled for one row is another."""

Gradients = Mapping[str, Tensor]
"""`<layer>.A` (rank, in) or `<layer>.B` (rank, out) to the mean gradient, fp32."""


@dataclass(frozen=True)
class Outcome:
    """One comparison."""

    name: str
    passed: bool
    numbers: Mapping[str, float | str]

    def record(self) -> dict[str, Any]:
        """For the result file."""
        return {"passed": self.passed, **self.numbers}

    def __str__(self) -> str:
        shown = ", ".join(
            f"{key} {value:.2e}" if isinstance(value, float) else f"{key} {value}" for key, value in self.numbers.items()
        )
        return f"check {self.name}: {'passed' if self.passed else 'FAILED'} ({shown})"


def fill(bank: lb.AdapterBank, name: str, seed: int) -> None:
    """Random A and B. B isn't zero, so that A has a gradient."""
    with torch.no_grad():
        for i, parameter in enumerate(bank.parameters(name)):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
            parameter.copy_(values * 0.02)


def peft_gradients(model: PreTrainedModel, adapter: lb.Adapter, ids_NL: Tensor, *, bf16: bool) -> tuple[float, Gradients]:
    """PEFT's loss and gradients, its usual way: adapters in fp32, under autocast when `bf16`."""
    config = peft.LoraConfig(r=adapter.config.rank, lora_alpha=int(ALPHA), target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    leaves = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            leaves[f"base_model.model.{path}.lora_A.default.weight"].copy_(layer.A)
            leaves[f"base_model.model.{path}.lora_B.default.weight"].copy_(layer.B)
    ids = ids_NL.to(next(model.parameters()).device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = wrapped(input_ids=ids, labels=ids).loss
    loss.backward()
    found: dict[str, Tensor] = {}
    for path in adapter.layers:
        for role in "AB":
            gradient = leaves[f"base_model.model.{path}.lora_{role}.default.weight"].grad
            assert gradient is not None
            found[f"{path}.{role}"] = (gradient.t() if role == "B" else gradient).float().clone()
    return float(loss.detach()), found


def our_gradients(training: Training, ids_NL: Tensor, names: Sequence[str], passes: int) -> dict[str, tuple[float, Gradients]]:
    """Each adapter's loss and gradients in the last of some passes: the fourth of a shape is a replay of its captured graph."""
    training.batch = as_batch(ids_NL, names)
    losses = training.forward_backward()
    for _ in range(passes - 1):
        training.clear()
        losses = training.forward_backward()
    found = {}
    for name in names:
        leaves = training.bank.named_parameters(name)
        gradients = {key: p.grad.float() / losses[name].tokens for key, p in leaves if p.grad is not None}
        found[name] = (losses[name].mean, gradients)
    training.clear()
    return found


def distance(mine: Tensor, other: Tensor) -> float:
    """Relative to the other's norm."""
    return float((mine - other).norm() / other.norm().clamp_min(1e-30))


def bounds_from(rounded: Gradients, exact: Gradients) -> dict[str, float]:
    """How far right gradients may differ, leaf by leaf."""
    return {key: min(LOOSEST, max(FINEST, FACTOR * distance(rounded[key], exact[key]))) for key in exact}


def compared(
    name: str, mine: tuple[float, Gradients], other: tuple[float, Gradients], bounds: Mapping[str, float], **more: float | str
) -> Outcome:
    """Loss and every gradient of two paths."""
    (loss, gradients), (other_loss, others) = mine, other
    off_loss = abs(loss - other_loss) / abs(other_loss)
    missing = sorted(others.keys() ^ gradients.keys())
    distances = {key: distance(gradients[key], others[key]) for key in others if key in gradients}
    worst = max(distances, key=lambda key: distances[key] / bounds[key], default="")
    # not `>`: NaN fails too
    passed = not missing and off_loss <= LOSS and all(distances[key] <= bounds[key] for key in distances)
    numbers = {"loss_difference": off_loss, "worst_leaf": missing[0] + " (missing)" if missing else worst, **more}
    if worst:
        numbers |= {"worst_distance": distances[worst], "its_bound": bounds[worst], "largest_distance": max(distances.values())}
    return Outcome(name, passed, numbers)


def check(
    shape: Shape,
    device: torch.device,
    *,
    compiled: bool = True,
    storages: Sequence[str] = (),
    adapters: int = ADAPTERS,
    tokens: int = TOKENS,
) -> Iterator[Outcome]:
    """Every comparison in turn: PEFT, recomputation, all adapters in one pass, then other storages of the base against bf16."""
    shape = replace(shape, layers=2)
    ids = token_rows(ROWS * adapters, tokens, shape.vocabulary)
    work = Work(rows=ROWS * adapters, tokens=tokens, ranks=(RANK,) * adapters)
    passes = 4 if device.type == "cuda" else 1

    training = _filled(llama(shape, device), work, compiled)
    names, adapter = training.names, training.bank.adapter(training.names[0])
    alone = our_gradients(training, ids, names[:1], passes)[names[0]]
    graphs = f"{len(training.engine.graphs._captured)} captured, refused: {training.engine.graphs.refused}"
    training.engine.gradient_checkpointing = True
    recomputed = our_gradients(training, ids, names[:1], passes)[names[0]]
    training.engine.gradient_checkpointing = False
    joint = our_gradients(training, ids, names, passes)
    singles = {name: our_gradients(training, ids[ROWS * i : ROWS * (i + 1)], [name], 1)[name] for i, name in enumerate(names)}
    training.close()
    del training

    rounded = peft_gradients(llama(shape, device), adapter, ids, bf16=True)
    free()
    exact = peft_gradients(llama(shape, device).float(), adapter, ids, bf16=False)
    free()
    bounds = bounds_from(rounded[1], exact[1])
    own = max(distance(rounded[1][key], exact[1][key]) for key in exact[1])
    yield compared("peft", alone, rounded, bounds, graphs=graphs, pefts_own_error=own)
    yield compared("recompute", recomputed, alone, bounds)
    each = [compared("joint", joint[name], singles[name], bounds) for name in names]
    yield max(each, key=lambda one: (not one.passed, one.numbers.get("largest_distance", 0.0)))
    for storage in storages:
        try:
            model = quantized(llama(shape, device), storage)
            mine = _first_gradients(model, work, ids, passes, compiled)
            if storage in FOUR_BITS:
                dequantize(model, torch.bfloat16)
                outcome = compared(storage, mine, _first_gradients(model, work, ids, passes, compiled), bounds)
            else:
                outcome = _same_direction(storage, mine, alone)
        except Exception as error:  # noqa: BLE001  items in bf16 don't depend on it
            traceback.print_exc()
            outcome = Outcome(storage, False, {"error": f"{type(error).__name__}: {error}"})
        model = None
        free()
        yield outcome


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain layers of the same weights in place of the quantised ones, one at a time."""
    for path, layer in list(model.named_modules()):
        kind = layer_kind(layer)
        if kind is not None and kind.quantized:
            weight_OI, bias = kind.weight_oi(layer._parameters, dtype), layer._parameters["bias"]
            plain = nn.Linear(*reversed(weight_OI.shape), bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(weight_OI, requires_grad=False)
            plain.bias = bias
            model.set_submodule(path, plain)


def _first_gradients(model: PreTrainedModel, work: Work, ids: Tensor, passes: int, compiled: bool) -> tuple[float, Gradients]:
    """Those of the first adapter over this base; the model is left as it was."""
    training = _filled(model, replace(work, ranks=(RANK,)), compiled)
    found = our_gradients(training, ids, training.names, passes)[training.names[0]]
    training.close()
    return found


def _filled(model: PreTrainedModel, work: Work, compiled: bool) -> Training:
    training = Training(model, work, compiled=compiled)
    for i, name in enumerate(training.names):
        fill(training.bank, name, i)
    return training


def _same_direction(name: str, mine: tuple[float, Gradients], other: tuple[float, Gradients]) -> Outcome:
    (loss, gradients), (other_loss, others) = mine, other
    a, b = (torch.cat([found[key].reshape(-1) for key in others]) for found in (gradients, others))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    off_loss = abs(loss - other_loss) / abs(other_loss)
    passed = cosine >= STORAGE_COSINE and off_loss <= STORAGE_LOSS
    return Outcome(name, passed, {"loss_difference": off_loss, "gradient_cosine": cosine, "gradient_distance": distance(a, b)})
