"""`SlotOptimizer`: one optimizer for all adapters of a bank, each with its own rule, numbers, step count and state.

A slot's state is one vector over its leaves for each name. A rule that has a fused step makes it in one pass over leaves,
gradients and state; otherwise the gradients are gathered into a vector too, and the rule's direction works on that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.config.checks import check_choice, check_fraction, check_non_negative, check_positive
from lorabank.errors import CheckpointError, ConfigError, LorabankError, closest
from lorabank.kernels.native import adamw as native_adamw
from lorabank.optim.rules import OPTIMIZERS, Fused, LeafStep, Rule, RuleNumbers

CPU_PIECE = 2**18
"""Elements that a rule works on at once on a CPU: its few vectors stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How one adapter is optimised."""

    rule: str = "adamw"
    """A name in `OPTIMIZERS`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages, each in [0, 1); SGD's momentum is the first."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled: parameters shrink by learning rate × this in each step."""
    loraplus_ratio: float = 1.0
    """Step size of B over that of A (LoRA+, arXiv:2402.12354)."""
    max_grad_norm: float = 1.0
    """L2 norm of the mean gradient above which it is scaled down to it; 0: no clipping."""

    def __post_init__(self) -> None:
        check_choice("optimizer", self.rule, OPTIMIZERS)
        for beta in self.betas:
            check_fraction("betas", beta)
        check_positive("eps", self.eps)
        check_positive("loraplus_ratio", self.loraplus_ratio)
        check_non_negative("weight_decay", self.weight_decay)
        check_non_negative("max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True, kw_only=True)
class SlotStep:
    """What a step of one adapter did."""

    grad_norm: float
    """L2 norm of the mean gradient before clipping."""
    finite: bool
    """False: the gradient had NaN or inf, so nothing was changed."""
    step: int
    """Optimizer steps of this adapter so far."""


@dataclass
class _Slot:
    config: OptimizerConfig
    leaves: Mapping[str, nn.Parameter]
    structure: int
    """The bank's structure count for which `leaves` were looked up."""
    step: int = 0
    state: tuple[Tensor, ...] = ()
    """One vector over all leaves, in their order, for each of the rule's `state_names`; made at the first step."""
    _views: tuple[tuple[Tensor, ...], list[list[Tensor]]] = ((), [])

    @property
    def state_views(self) -> list[list[Tensor]]:
        """For each state vector its part of every leaf, in the leaf's shape."""
        if self._views[0] is not self.state:
            views = [[part.view_as(p) for part, p in zip(_parts(v, self), self.leaves.values(), strict=True)] for v in self.state]
            self._views = (self.state, views)
        return self._views[1]

    @property
    def rule(self) -> Rule:
        return OPTIMIZERS[self.config.rule]


class SlotOptimizer:
    """State exists only for a slot's own leaves. A step of some slots leaves every other slot and its state byte-identical."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._slots: dict[str, _Slot] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that this optimizer trains."""
        return tuple(self._slots)

    def add(self, name: str, config: OptimizerConfig | None = None) -> None:
        """Start optimising an adapter of the bank, from step 0."""
        leaves = dict(self._bank.named_parameters(name))
        self._slots[name] = _Slot(config or OptimizerConfig(), leaves, self._bank.structure)

    def remove(self, name: str) -> None:
        """Forget an adapter and its state."""
        self._known(name)
        del self._slots[name]

    def config(self, name: str) -> OptimizerConfig:
        """How an adapter is optimised."""
        return self._known(name).config

    def steps(self, name: str) -> int:
        """Optimizer steps that an adapter has made."""
        return self._known(name).step

    def step(self, learning_rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
        """One step of the adapters in `learning_rates`; others are left alone.

        Gradients are sums over tokens: they are divided by the adapter's own `tokens` (Σ of token weights since its last step),
        clipped by its own norm, and cleared. A leaf that no row reached counts as gradient zero. An adapter whose gradient isn't
        finite is not stepped. Raises before anything changes: LorabankError for an adapter without any gradient, ConfigError for
        token weights that don't sum to a number above zero.
        """
        slots = {name: self._slot(name) for name in learning_rates}
        for name, slot in slots.items():
            _check_ready(name, slot, tokens)
        with torch.no_grad():
            return {name: _step(slot, float(learning_rates[name]), float(tokens[name])) for name, slot in slots.items()}

    def zero_grad(self, name: str) -> None:
        """Drop an adapter's gradients."""
        _clear(self._slot(name))

    def state(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """(steps, `<leaf>.<state name>` → tensor of the leaf's shape): all that a resumed run needs. Tensors are live views."""
        slot = self._slot(name)
        found: dict[str, Tensor] = {}
        for what, views in zip(slot.rule.state_names, slot.state_views, strict=False):
            found |= {f"{key}.{what}": view for key, view in zip(slot.leaves, views, strict=True)}
        return slot.step, found

    def check_state(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless `tensors` is a state of this adapter under its rule."""
        slot = self._slot(name)
        names = slot.rule.state_names if step else ()
        shapes = {f"{key}.{what}": leaf.shape for key, leaf in slot.leaves.items() for what in names}
        wrong = sorted(shapes.keys() ^ tensors.keys()) or [key for key, shape in shapes.items() if tensors[key].shape != shape]
        if wrong:
            got = tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "none"
            expected = tuple(shapes[wrong[0]]) if wrong[0] in shapes else "none"
            raise CheckpointError(
                f"optimizer state of {name!r} ({slot.config.rule}, step {step}) doesn't belong to this adapter: "
                f"{wrong[0]}: expected {expected}, got {got}"
            )

    def load_state(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises CheckpointError before anything changes."""
        self.check_state(name, step, tensors)
        slot = self._slot(name)
        slot.step, slot.state = step, ()
        if step:
            like = _one_device(name, slot)
            slot.state = tuple(
                torch.cat([tensors[f"{key}.{what}"].to(like.device, like.dtype).reshape(-1) for key in slot.leaves])
                for what in slot.rule.state_names
            )

    def _known(self, name: str) -> _Slot:
        if name not in self._slots:
            raise LorabankError(
                f"adapter {name!r} is not in this optimizer{closest(name, self._slots)}; call optimizer.add({name!r}) first"
            )
        return self._slots[name]

    def _slot(self, name: str) -> _Slot:
        """The slot, its leaves checked to be the bank's present ones."""
        slot = self._known(name)
        if slot.structure != self._bank.structure:
            leaves = dict(self._bank.named_parameters(name))
            if [id(p) for p in leaves.values()] != [id(p) for p in slot.leaves.values()]:
                raise LorabankError(
                    f"adapter {name!r} was removed from the bank and added again, so this optimizer's state isn't its own. "
                    f"Call optimizer.add({name!r}) to start it afresh."
                )
            slot.structure = self._bank.structure
        return slot


def _check_ready(name: str, slot: _Slot, tokens: Mapping[str, float]) -> None:
    given = tokens.get(name)
    if given is None or not math.isfinite(given) or given <= 0:
        raise ConfigError(
            f"optim_step: tokens[{name!r}]: expected Σ of its token weights since its last step, a number > 0, got {given!r}"
        )
    if all(leaf.grad is None for leaf in slot.leaves.values()):
        raise LorabankError(f"optim_step: adapter {name!r} has no gradient. Call forward_backward with rows routed to it first.")
    _one_device(name, slot)


def _one_device(name: str, slot: _Slot) -> nn.Parameter:
    first = next(iter(slot.leaves.values()))
    other = next((key for key, leaf in slot.leaves.items() if leaf.device != first.device), None)
    if other is not None:
        raise LorabankError(
            f"adapter {name!r} lies on several devices ({first.device}, and {slot.leaves[other].device} for {other}), which the "
            "optimizer can't step yet. Load the base on one device."
        )
    return first


def _step(slot: _Slot, learning_rate: float, tokens: float) -> SlotStep:
    # contiguous, since a fused kernel goes through memory in order; autograd's own gradients are
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in slot.leaves.values()]
    _clear(slot)
    whole = native_adamw.norm(gradients) if native_adamw.suits(gradients) else float(torch.nn.utils.get_total_norm(gradients))
    norm = whole / tokens
    if not math.isfinite(norm):
        return SlotStep(grad_norm=norm, finite=False, step=slot.step)
    slot.step += 1
    config = slot.config
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
    _ready_state(slot)
    if slot.rule.fused is not None and all(p.dtype == torch.float32 for p in slot.leaves.values()):
        _fused_step(slot, slot.rule.fused, gradients, learning_rate, tokens / clip)
    else:
        _plain_step(slot, gradients, learning_rate, tokens / clip)
    return SlotStep(grad_norm=norm, finite=True, step=slot.step)


def _plain_step(slot: _Slot, gradients: Sequence[Tensor], learning_rate: float, divisor: float) -> None:
    gradient_n = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(divisor)
    size = CPU_PIECE if gradient_n.device.type == "cpu" else max(1, gradient_n.numel())
    for piece, *state in zip(*(vector.split(size) for vector in (gradient_n, *slot.state)), strict=True):
        slot.rule.direction(piece, state, _numbers(slot))
    for (key, leaf), direction in zip(slot.leaves.items(), _parts(gradient_n, slot), strict=True):
        rate = learning_rate * (slot.config.loraplus_ratio if key.endswith(".B") else 1.0)
        if slot.config.weight_decay:
            leaf.mul_(1.0 - rate * slot.config.weight_decay)
        leaf.add_(direction.view_as(leaf), alpha=-rate)


def _fused_step(slot: _Slot, fused: Fused, gradients: Sequence[Tensor], learning_rate: float, divisor: float) -> None:
    leaves = list(slot.leaves.items())
    for role, ratio in ((".A", 1.0), (".B", slot.config.loraplus_ratio)):
        mine = [i for i, (key, _) in enumerate(leaves) if key.endswith(role)]
        part = LeafStep(
            leaves=[leaves[i][1] for i in mine],
            gradients=[gradients[i] for i in mine],
            state=[[views[i] for i in mine] for views in slot.state_views],
            learning_rate=learning_rate * ratio,
            weight_decay=slot.config.weight_decay,
            divisor=divisor,
        )
        fused(part, _numbers(slot))


def _numbers(slot: _Slot) -> RuleNumbers:
    betas = slot.config.betas
    return RuleNumbers(beta1=betas[0], beta2=betas[1], eps=slot.config.eps, step=slot.step)


def _ready_state(slot: _Slot) -> None:
    """Make the state at the first step, and let it follow the leaves to another device."""
    device, dtype = (first := next(iter(slot.leaves.values()))).device, first.dtype
    if not slot.state:
        count = sum(leaf.numel() for leaf in slot.leaves.values())
        slot.state = tuple(torch.zeros(count, device=device, dtype=dtype) for _ in slot.rule.state_names)
    elif slot.state[0].device != device:
        slot.state = tuple(vector.to(device) for vector in slot.state)


def _parts(vector_n: Tensor, slot: _Slot) -> Sequence[Tensor]:
    return vector_n.split([leaf.numel() for leaf in slot.leaves.values()])


def _clear(slot: _Slot) -> None:
    for leaf in slot.leaves.values():
        leaf.grad = None
