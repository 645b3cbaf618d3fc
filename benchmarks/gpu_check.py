"""Correctness before speed: our compiled path beside PEFT's on a cut model, and a joint pass beside single ones.

How far two right bf16 paths may differ isn't guessed but measured: PEFT's bf16 gradient of each leaf lies at some distance from
PEFT's gradient in fp32, on the same weights, adapters and rows. Ours may differ from PEFT's bf16 gradient by FACTOR times that:
two independent paths of equal error differ by √2 times it, in the worst case by twice.

A base in 4 bits is compared with a bf16 base whose weights are what the codes stand for: what is left is rounding again. fp8
rounds activations too, to which no bf16 base corresponds: there the direction of the whole gradient is held to bf16's, and each
leaf to the emulated twin, plain torch that rounds as the units do. Two right paths of fp8 are far apart, since a difference in
bf16's last place sends a number to e4m3's other side. How far is measured again: the twin in bf16 beside the twin in fp32.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from gpu_model import ALPHA, TARGETS, Shape, Training, Work, as_batch, free, llama, quantized, token_rows
from gpu_problems import MIXED_RANKS
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
TWIN_FACTOR = 1.5
"""How far fp8 may be from its emulated twin, leaf by leaf, in distances of that twin from itself in fp32. Simulated on a CPU with
weights of true gain (hidden 512, std 0.02 √8), the largest leaf of each of three seeds: sums cut as the units cut them over 4,096
and 14,336 numbers 0.83 to 0.87, cut by a bit more 0.89 to 0.94; no rounding of fp8 at all 1.78 to 1.84, one scale off by 1.2 1.74
to 2.92."""
TWIN_LAYERS = 1
"""Two blocks double the distance of right paths, in which a wrong scale drowns (0.90 to 0.96 beside 0.95). What one block doesn't
show is dx of queries, keys and values, below which no adapter is: that is seen by the direction alone."""
FOUR_BITS = ("nf4",)
ADAPTERS, TOKENS, RANK = 8, 128, 16
EXAMPLES = 4
"""Of a packed row."""
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


def our_gradients(
    training: Training, ids_NL: Tensor, names: Sequence[str], passes: int, packed: int = 1
) -> dict[str, tuple[float, Gradients]]:
    """Each adapter's loss and gradients in the last of some passes: the fourth of a shape is a replay of its captured graph."""
    training.batch = as_batch(ids_NL, names, packed)
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
    name: str,
    mine: tuple[float, Gradients],
    other: tuple[float, Gradients],
    bounds: Mapping[str, float],
    *,
    loss_bound: float = LOSS,
    **more: float | str,
) -> Outcome:
    """Loss and every gradient of two paths."""
    (loss, gradients), (other_loss, others) = mine, other
    off_loss = abs(loss - other_loss) / abs(other_loss)
    missing = sorted(others.keys() ^ gradients.keys())
    distances = {key: distance(gradients[key], others[key]) for key in others if key in gradients}
    worst = max(distances, key=lambda key: distances[key] / bounds[key], default="")
    # not `>`: NaN fails too
    passed = not missing and off_loss <= loss_bound and all(distances[key] <= bounds[key] for key in distances)
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
    offloaded: Sequence[str] = (),
    mixed: bool = False,
    packed: bool = False,
    long: int = 0,
    adapters: int = ADAPTERS,
    tokens: int = TOKENS,
) -> Iterator[Outcome]:
    """Every comparison in turn: PEFT, recomputation, all adapters in one pass, then other storages of the base.

    `offloaded`: storages (bf16 too) over which steps are timed that recompute and keep what they start from on the host: a form
    of the blocks of its own. `mixed`: also adapters of ranks 4 to 64 in one pass. `packed`: also rows of several examples.
    `long`: also rows of so many tokens, as steps are timed with: long rows have products and attention that short ones haven't.
    """
    shape = replace(shape, layers=2)
    ids = token_rows(ROWS * adapters, tokens, shape.vocabulary)
    work = Work(rows=ROWS * adapters, tokens=tokens, ranks=(RANK,) * adapters)
    passes = 4 if device.type == "cuda" else 1

    training = _filled(llama(shape, device), work, compiled)
    engine, names, adapter = training.engine, training.names, training.bank.adapter(training.names[0])
    alone = our_gradients(training, ids, names[:1], passes)[names[0]]
    graphs = f"{len(engine.graphs._captured)} captured, refused: {engine.graphs.refused}"
    engine.gradient_checkpointing = True
    recomputed = our_gradients(training, ids, names[:1], passes)[names[0]]
    engine.activation_offloading = bool(offloaded)
    kept_away = our_gradients(training, ids, names[:1], passes)[names[0]] if offloaded else None
    host_bytes = engine.offload.bytes
    engine.gradient_checkpointing = engine.activation_offloading = False
    joint, singles = _joint_and_singles(training, ids, passes, range(adapters))
    together = _packed_and_apart(training, ids, passes) if packed else None
    rows = token_rows(ROWS, long, shape.vocabulary)
    timed = our_gradients(training, rows, names[:1], passes)[names[0]] if long else None
    training.close()
    del training, engine

    rounded = peft_gradients(llama(shape, device), adapter, ids, bf16=True)
    free()
    exact = peft_gradients(llama(shape, device).float(), adapter, ids, bf16=False)
    free()
    bounds = bounds_from(rounded[1], exact[1])
    own = max(distance(rounded[1][key], exact[1][key]) for key in exact[1])
    yield compared("peft", alone, rounded, bounds, graphs=graphs, pefts_own_error=own)
    yield compared("recompute", recomputed, alone, bounds)
    if kept_away is not None:
        outcome = compared("offload", kept_away, alone, bounds, host_bytes=host_bytes)
        yield replace(outcome, passed=outcome.passed and host_bytes > 0)
    yield _worst("joint", joint, singles, bounds)
    if timed is not None:
        yield _long(shape, device, adapter, rows, timed)
    if together is not None:
        yield compared("packed", *together, bounds)
    if mixed:
        yield _check_mixed(llama(shape, device), ids, passes, compiled, bounds)
    for storage in storages:
        away = storage in offloaded
        mine_work = replace(work, ranks=(RANK,), recompute=away, offload=away)
        try:
            if storage in FOUR_BITS:
                outcome = _beside_its_weights(storage, llama(shape, device), mine_work, ids, passes, compiled, bounds)
            else:
                mine = _first_gradients(quantized(llama(shape, device), storage), mine_work, ids, passes, compiled)
                free()
                outcome = _both(
                    _same_direction(storage, mine, alone),
                    _beside_twin(storage, replace(shape, layers=TWIN_LAYERS), device, mine_work, ids, passes, compiled),
                )
        except Exception as error:  # noqa: BLE001  items in bf16 don't depend on it
            traceback.print_exc()
            outcome = Outcome(storage, False, {"error": f"{type(error).__name__}: {error}"})
        free()
        yield outcome


def _joint_and_singles(
    training: Training, ids: Tensor, passes: int, which: Sequence[int]
) -> tuple[dict[str, tuple[float, Gradients]], dict[str, tuple[float, Gradients]]]:
    """(every adapter in one pass, some of them each in a pass of its own), on the same rows."""
    names = training.names
    joint = our_gradients(training, ids, names, passes)
    alone = {names[i]: our_gradients(training, ids[ROWS * i : ROWS * (i + 1)], [names[i]], 1)[names[i]] for i in which}
    return joint, alone


def _long(shape: Shape, device: torch.device, adapter: lb.Adapter, rows: Tensor, mine: tuple[float, Gradients]) -> Outcome:
    """Against PEFT on the same rows."""
    rounded = peft_gradients(llama(shape, device), adapter, rows, bf16=True)
    free()
    exact = peft_gradients(llama(shape, device).float(), adapter, rows, bf16=False)
    free()
    return compared("long", mine, rounded, bounds_from(rounded[1], exact[1]), tokens=str(rows.shape[1]))


def _packed_and_apart(training: Training, ids: Tensor, passes: int) -> tuple[tuple[float, Gradients], tuple[float, Gradients]]:
    """The first adapter's over examples that are packed into rows, and over the same in rows of their own."""
    names = training.names[:1]
    packed = our_gradients(training, ids, names, passes, EXAMPLES)[names[0]]
    return packed, our_gradients(training, ids.reshape(EXAMPLES * len(ids), -1), names, passes)[names[0]]


def _worst(
    name: str,
    joint: Mapping[str, tuple[float, Gradients]],
    singles: Mapping[str, tuple[float, Gradients]],
    bounds: Mapping[str, float],
) -> Outcome:
    """Of the comparisons of `singles` with the joint pass that which failed, else that which is furthest off."""
    each = [compared(name, joint[which], single, bounds, adapter=which) for which, single in singles.items()]
    return max(each, key=lambda one: (not one.passed, one.numbers.get("largest_distance", 0.0)))


def _check_mixed(model: PreTrainedModel, ids: Tensor, passes: int, compiled: bool, bounds: Mapping[str, float]) -> Outcome:
    """Adapters of mixed ranks in one pass against the lowest, a middle and the highest rank alone: three say enough."""
    ranks = MIXED_RANKS[: len(ids) // ROWS]
    training = _filled(model, Work(rows=len(ids), tokens=ids.shape[1], ranks=ranks), compiled)
    outcome = _worst("mixed", *_joint_and_singles(training, ids, passes, sorted({0, len(ranks) // 2, len(ranks) - 1})), bounds)
    training.close()
    return outcome


def _beside_its_weights(
    name: str, model: PreTrainedModel, work: Work, ids: Tensor, passes: int, compiled: bool, bounds: Mapping[str, float]
) -> Outcome:
    """A base in codes against one of the weights that they stand for."""
    mine = _first_gradients(quantized(model, name), work, ids, passes, compiled)
    dequantize(model, torch.bfloat16)
    plain = replace(work, recompute=False, offload=False)
    return compared(name, mine, _first_gradients(model, plain, ids, passes, compiled), bounds)


def _beside_twin(name: str, shape: Shape, device: torch.device, work: Work, ids: Tensor, passes: int, compiled: bool) -> Outcome:
    """fp8 against plain torch that rounds as its units do, leaf by leaf."""
    mine = _first_gradients(quantized(llama(shape, device), name), work, ids, passes, compiled)
    free()
    plain = replace(work, recompute=False, offload=False)
    rounded = _first_gradients(emulated(llama(shape, device)), plain, ids, 1, False)
    model: Any = llama(shape, device).float()
    exact = _first_gradients(emulated(model), plain, ids, 1, False)
    own = {key: distance(rounded[1][key], exact[1][key]) for key in exact[1]}
    bounds = {key: max(FINEST, TWIN_FACTOR * value) for key, value in own.items()}
    return compared(name, mine, rounded, bounds, loss_bound=STORAGE_LOSS, own_distance=max(own.values()))


def emulated(model: PreTrainedModel) -> PreTrainedModel:
    """The model with layers that compute in plain torch what fp8 units do."""
    lb.quantize_base(model, "fp8", emulate=True, say=lambda sentence: None)
    return model


def _both(direction: Outcome, twin: Outcome) -> Outcome:
    """Two outcomes as one; what was compared with the twin is named so."""
    numbers = {**direction.numbers, **{f"twin_{key}": value for key, value in twin.numbers.items()}}
    return Outcome(direction.name, direction.passed and twin.passed, numbers)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain layers of the same weights in place of the quantised ones, one at a time."""
    for path, layer in list(model.named_modules()):
        kind = layer_kind(layer)
        if kind is not None and kind.quantized:
            weight_OI, bias = kind.weight_oi(layer._parameters, dtype), layer._parameters["bias"]
            plain = nn.Linear(*reversed(weight_OI.shape), bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(weight_OI)
            plain.bias = bias
            model.set_submodule(path, plain)


def _first_gradients(model: PreTrainedModel, work: Work, ids: Tensor, passes: int, compiled: bool) -> tuple[float, Gradients]:
    """Those of its only adapter over this base; the model is left as it was."""
    training = _filled(model, work, compiled)
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
