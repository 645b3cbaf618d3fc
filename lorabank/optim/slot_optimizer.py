"""`SlotOptimizer`: one optimizer for all adapters of a bank, each with its own rule, numbers, step count and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.config.checks import check_choice
from lorabank.errors import LorabankError, closest
from lorabank.optim.rules import OPTIMIZERS, TensorStep


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How one adapter is optimised."""

    rule: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    loraplus_ratio: float = 1.0
    """Step size of B over that of A."""
    max_grad_norm: float = 1.0
    """0: no clipping."""

    def __post_init__(self) -> None:
        check_choice("optimizer", self.rule, OPTIMIZERS)


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
class _SlotState:
    config: OptimizerConfig
    step: int = 0
    tensors: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Leaf name to its state tensors; made at the first step."""


class SlotOptimizer:
    """State exists only for a slot's own leaves. A step of some slots leaves every other slot and its state byte-identical."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._slots: dict[str, _SlotState] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that this optimizer trains."""
        return tuple(self._slots)

    def add(self, name: str, config: OptimizerConfig | None = None) -> None:
        """Start optimising an adapter of the bank."""
        self._bank.config(name)
        self._slots[name] = _SlotState(config or OptimizerConfig())

    def remove(self, name: str) -> None:
        """Forget an adapter and its state."""
        self._state(name)
        del self._slots[name]

    def steps(self, name: str) -> int:
        """Optimizer steps that an adapter has made."""
        return self._state(name).step

    def step(self, learning_rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
        """One step of the adapters in `learning_rates`; others are left alone.

        Gradients are sums over tokens: they are divided by the adapter's own `tokens`, clipped by its own norm, and cleared.
        An adapter whose gradient isn't finite is not stepped.
        """
        results: dict[str, SlotStep] = {}
        by_rule: dict[str, list[TensorStep]] = {}
        with torch.no_grad():
            for name, learning_rate in learning_rates.items():
                state = self._state(name)
                named = {key: p for key, p in self._bank.named_parameters(name) if p.grad is not None}
                gradients = {key: p.grad for key, p in named.items() if p.grad is not None}
                norm = self._norm(gradients.values()) / max(tokens[name], 1e-12)
                finite = bool(torch.isfinite(torch.tensor(norm)))
                if finite:
                    state.step += 1
                    clip = state.config.max_grad_norm
                    scale = (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / max(tokens[name], 1e-12)
                    torch._foreach_mul_(list(gradients.values()), scale)
                    by_rule.setdefault(state.config.rule, []).extend(
                        self._tensor_step(state, key, p, gradients[key], learning_rate) for key, p in named.items()
                    )
                results[name] = SlotStep(grad_norm=norm, finite=finite, step=state.step)
            for rule, steps in by_rule.items():
                if steps:
                    OPTIMIZERS[rule].update(steps)
        for name in learning_rates:
            self.zero_grad(name)
        return results

    def zero_grad(self, name: str) -> None:
        """Drop an adapter's gradients."""
        for p in self._bank.parameters(name):
            p.grad = None

    def state(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """(steps, `<leaf>.<state name>` → tensor): all that a resumed run needs. The tensors are the live ones."""
        slot = self._state(name)
        names = OPTIMIZERS[slot.config.rule].state_names
        return slot.step, {f"{key}.{what}": t for key, tensors in slot.tensors.items() for what, t in zip(names, tensors, strict=True)}

    def load_state(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        slot = self._state(name)
        names = OPTIMIZERS[slot.config.rule].state_names
        leaves = dict(self._bank.named_parameters(name))
        keys = {key.rpartition(".")[0] for key in tensors}
        unknown = sorted(keys - leaves.keys())
        if unknown or len(tensors) != len(keys) * len(names):
            raise LorabankError(f"optimizer state of {name!r} doesn't belong to this adapter and rule{f': {unknown[0]!r}' if unknown else ''}")
        slot.step = step
        slot.tensors = {
            key: tuple(tensors[f"{key}.{what}"].to(leaf.device, leaf.dtype, copy=True) for what in names)
            for key, leaf in leaves.items()
            if key in keys
        }

    def _state(self, name: str) -> _SlotState:
        if name not in self._slots:
            raise LorabankError(f"adapter {name!r} is not in this optimizer{closest(name, self._slots)}; call optimizer.add({name!r}) first")
        return self._slots[name]

    def _norm(self, gradients: Iterable[Tensor]) -> float:
        norms = torch._foreach_norm(list(gradients))
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _tensor_step(self, slot: _SlotState, key: str, leaf: nn.Parameter, gradient: Tensor, learning_rate: float) -> TensorStep:
        config = slot.config
        if key not in slot.tensors:
            slot.tensors[key] = tuple(torch.zeros_like(leaf) for _ in OPTIMIZERS[config.rule].state_names)
        return TensorStep(
            parameter=leaf,
            gradient=gradient,
            state=slot.tensors[key],
            step=slot.step,
            learning_rate=learning_rate * (config.loraplus_ratio if key.endswith(".B") else 1.0),
            beta1=config.betas[0],
            beta2=config.betas[1],
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
