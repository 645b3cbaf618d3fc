"""Update rules as plain functions on one slot's flat vectors. One table: `OPTIMIZERS`.

Every rule shares one outer form, p ← p · (1 − lr · decay) − lr · direction, so a rule is only its direction. It works element by
element, so a result depends on nothing but the element's own gradients. Shapes: n parameters of a slot (or a piece of them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.kernels.native import adamw as native_adamw


@dataclass(frozen=True, kw_only=True)
class RuleNumbers:
    """A slot's settings in one step."""

    beta1: float
    beta2: float
    eps: float
    step: int
    """1-based."""


Direction = Callable[[Tensor, Sequence[Tensor], RuleNumbers], None]
"""(gradient (n,), state tensors (n,), numbers): updates the state in place and writes the direction over the gradient."""


@dataclass(frozen=True, kw_only=True)
class LeafStep:
    """What a fused step works on: a slot's leaves with one learning rate, each with its gradient and its state."""

    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]
    state: Sequence[Sequence[Tensor]]
    """For each of the rule's `state_names` a tensor a leaf."""
    learning_rate: float
    weight_decay: float
    divisor: float
    """By which gradients are divided first."""


Fused = Callable[[LeafStep, RuleNumbers], None]
"""The whole step of some leaves in place, in one pass over them; gradients may be written over."""


@dataclass(frozen=True)
class Rule:
    """An optimizer: the names of its state tensors, which start at zero, and its direction."""

    state_names: tuple[str, ...]
    direction: Direction
    fused: Fused | None = None
    """The same step in one pass over fp32 leaves, where there is something faster."""


def adamw(gradient_n: Tensor, state: Sequence[Tensor], numbers: RuleNumbers) -> None:
    """AdamW (arXiv:1711.05101): bias-corrected first moment over the root of the second."""
    first_n, second_n = state
    first_n.lerp_(gradient_n, 1.0 - numbers.beta1)
    second_n.mul_(numbers.beta2).addcmul_(gradient_n, gradient_n, value=1.0 - numbers.beta2)
    denominator_n = second_n.sqrt().div_((1.0 - numbers.beta2**numbers.step) ** 0.5).add_(numbers.eps)
    gradient_n.copy_(first_n).div_(denominator_n).div_(1.0 - numbers.beta1**numbers.step)


def fused_adamw(step: LeafStep, numbers: RuleNumbers) -> None:
    """`adamw` in one pass: in C on a CPU where it was compiled, else the kernel behind torch.optim.AdamW(fused=True)."""
    device = step.leaves[0].device
    first, second = step.state
    if native_adamw.suits(step.leaves, step.gradients, first, second):
        native_adamw.adamw(
            step.leaves, step.gradients, first, second, divisor=step.divisor, learning_rate=step.learning_rate,
            weight_decay=step.weight_decay, betas=(numbers.beta1, numbers.beta2), eps=numbers.eps, step=numbers.step,
        )  # fmt: skip
        return
    torch.ops.aten._fused_adamw_(
        list(step.leaves), list(step.gradients), list(first), list(second), [],
        [torch.tensor(float(numbers.step), device=device)] * len(step.leaves),
        lr=step.learning_rate, beta1=numbers.beta1, beta2=numbers.beta2, weight_decay=step.weight_decay, eps=numbers.eps,
        amsgrad=False, maximize=False, grad_scale=torch.tensor(step.divisor, device=device), found_inf=None,
    )  # fmt: skip


def sgd(gradient_n: Tensor, state: Sequence[Tensor], numbers: RuleNumbers) -> None:
    """SGD with momentum β₁ (0 for none): v ← β₁ v + g."""
    (velocity_n,) = state
    gradient_n.copy_(velocity_n.mul_(numbers.beta1).add_(gradient_n))


def lion(gradient_n: Tensor, state: Sequence[Tensor], numbers: RuleNumbers) -> None:
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum."""
    (momentum_n,) = state
    direction_n = momentum_n.lerp(gradient_n, 1.0 - numbers.beta1).sign_()
    momentum_n.lerp_(gradient_n, 1.0 - numbers.beta2)
    gradient_n.copy_(direction_n)


OPTIMIZERS: Mapping[str, Rule] = {
    "adamw": Rule(("exp_avg", "exp_avg_sq"), adamw, fused_adamw),
    "sgd": Rule(("momentum",), sgd),
    "lion": Rule(("momentum",), lion),
}
