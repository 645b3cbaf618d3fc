"""A step of one slot, one slot after the other: in one pass over its leaves where the rule has that, else by its direction.

It reads the gradient's norm before it goes on, which on a GPU waits for the GPU; `gpu.py` has the step that doesn't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorabank.kernels.native import adamw as native_adamw
from lorabank.optim.rules import Fused, LeafStep, RuleNumbers
from lorabank.optim.slots import Slot, SlotStep

CPU_PIECE = 2**18
"""Elements that a rule works on at once on a CPU: its few vectors stay in the cache."""


def step(slot: Slot, learning_rate: float, tokens: float) -> SlotStep:
    """One step in place, unless the gradient isn't finite; gradients are divided by `tokens`, clipped and cleared."""
    # contiguous, since a fused kernel goes through memory in order; autograd's own gradients are
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in slot.parameters]
    slot.clear()
    whole = native_adamw.norm(gradients) if native_adamw.suits(gradients) else float(torch.nn.utils.get_total_norm(gradients))
    norm = whole / tokens
    if not math.isfinite(norm):
        return SlotStep(grad_norm=norm, finite=False, step=slot.step)
    slot.step += 1
    config = slot.config
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
    slot.ready_state()
    if slot.rule.fused is not None and all(p.dtype == torch.float32 for p in slot.parameters):
        _fused_step(slot, slot.rule.fused, gradients, learning_rate, tokens / clip)
    else:
        _plain_step(slot, gradients, learning_rate, tokens / clip)
    return SlotStep(grad_norm=norm, finite=True, step=slot.step)


def _plain_step(slot: Slot, gradients: Sequence[Tensor], learning_rate: float, divisor: float) -> None:
    gradient_n = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(divisor)
    size = CPU_PIECE if gradient_n.device.type == "cpu" else max(1, gradient_n.numel())
    for piece, *state in zip(*(vector.split(size) for vector in (gradient_n, *slot.state)), strict=True):
        slot.rule.direction(piece, state, _numbers(slot))
    for (key, leaf), direction in zip(slot.leaves.items(), slot.parts(gradient_n), strict=True):
        rate = learning_rate * (slot.config.loraplus_ratio if key.endswith(".B") else 1.0)
        if slot.config.weight_decay:
            leaf.mul_(1.0 - rate * slot.config.weight_decay)
        leaf.add_(direction.view_as(leaf), alpha=-rate)


def _fused_step(slot: Slot, fused: Fused, gradients: Sequence[Tensor], learning_rate: float, divisor: float) -> None:
    leaves = list(slot.leaves.items())
    for is_b, ratio in ((False, 1.0), (True, slot.config.loraplus_ratio)):
        mine = [i for i, (key, _) in enumerate(leaves) if key.endswith(".B") == is_b]
        part = LeafStep(
            leaves=[leaves[i][1] for i in mine],
            gradients=[gradients[i] for i in mine],
            state=[[views[i] for i in mine] for views in slot.state_views],
            learning_rate=learning_rate * ratio,
            weight_decay=slot.config.weight_decay,
            divisor=divisor,
        )
        fused(part, _numbers(slot))


def _numbers(slot: Slot) -> RuleNumbers:
    betas = slot.config.betas
    return RuleNumbers(beta1=betas[0], beta2=betas[1], eps=slot.config.eps, step=slot.step)
