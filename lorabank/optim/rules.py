"""Update rules over many tensors at once, with numbers of their own for each tensor. One table: `OPTIMIZERS`.

A rule changes parameters and state in place, element by element, so a tensor's result doesn't depend on what else is in the
lists. Tensors of other slots are not in the lists and can't be touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorStep:
    """One parameter tensor in one step."""

    parameter: Tensor
    gradient: Tensor
    """Divided by the slot's tokens and clipped."""
    state: tuple[Tensor, ...]
    """One tensor of the parameter's shape for each of the rule's `state_names`."""
    step: int
    """1-based."""
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Rule:
    """An optimizer: the names of its state tensors and its update."""

    state_names: tuple[str, ...]
    update: Callable[[Sequence[TensorStep]], None]


def _decay(steps: Sequence[TensorStep]) -> None:
    if any(s.weight_decay for s in steps):
        torch._foreach_mul_([s.parameter for s in steps], [1.0 - s.learning_rate * s.weight_decay for s in steps])


def adamw(steps: Sequence[TensorStep]) -> None:
    """AdamW (arXiv:1711.05101): decoupled decay, bias-corrected moments."""
    parameters, gradients = [s.parameter for s in steps], [s.gradient for s in steps]
    first, second = [s.state[0] for s in steps], [s.state[1] for s in steps]
    _decay(steps)
    torch._foreach_mul_(first, [s.beta1 for s in steps])
    torch._foreach_add_(first, torch._foreach_mul(gradients, [1.0 - s.beta1 for s in steps]))
    torch._foreach_mul_(second, [s.beta2 for s in steps])
    torch._foreach_addcmul_(second, gradients, gradients, [1.0 - s.beta2 for s in steps])
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, [(1.0 - s.beta2**s.step) ** 0.5 for s in steps])
    torch._foreach_add_(denominator, [s.eps for s in steps])
    torch._foreach_addcdiv_(parameters, first, denominator, [-s.learning_rate / (1.0 - s.beta1**s.step) for s in steps])


def sgd(steps: Sequence[TensorStep]) -> None:
    """SGD with momentum β₁ (0 for none): v ← β₁ v + g, p ← p − lr v."""
    _decay(steps)
    momentum = [s.state[0] for s in steps]
    torch._foreach_mul_(momentum, [s.beta1 for s in steps])
    torch._foreach_add_(momentum, [s.gradient for s in steps])
    torch._foreach_add_([s.parameter for s in steps], torch._foreach_mul(momentum, [-s.learning_rate for s in steps]))


def lion(steps: Sequence[TensorStep]) -> None:
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum."""
    _decay(steps)
    gradients, momentum = [s.gradient for s in steps], [s.state[0] for s in steps]
    direction = torch._foreach_mul(momentum, [s.beta1 for s in steps])
    torch._foreach_add_(direction, torch._foreach_mul(gradients, [1.0 - s.beta1 for s in steps]))
    torch._foreach_sign_(direction)
    torch._foreach_add_([s.parameter for s in steps], torch._foreach_mul(direction, [-s.learning_rate for s in steps]))
    torch._foreach_mul_(momentum, [s.beta2 for s in steps])
    torch._foreach_add_(momentum, torch._foreach_mul(gradients, [1.0 - s.beta2 for s in steps]))


OPTIMIZERS: Mapping[str, Rule] = {
    "adamw": Rule(("exp_avg", "exp_avg_sq"), adamw),
    "sgd": Rule(("momentum",), sgd),
    "lion": Rule(("momentum",), lion),
}
