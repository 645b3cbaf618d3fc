"""What an optimizer knows of one slot: its settings, leaves, state and step count, and what a step of it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabank.config.checks import check_choice, check_fraction, check_non_negative, check_positive
from lorabank.errors import LorabankError
from lorabank.optim.rules import OPTIMIZERS, Rule


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


class SlotStep:
    """What a step of one adapter did. On a GPU the step may still be under way: the first look at any of it waits for it."""

    __slots__ = ("_read",)

    def __init__(self, *, grad_norm: float, finite: bool, step: int) -> None:
        self._read: Callable[[], tuple[float, bool, int]] = lambda: (grad_norm, finite, step)

    @classmethod
    def later(cls, read: Callable[[], tuple[float, bool, int]]) -> SlotStep:
        """A step whose (grad_norm, finite, step) `read` gives, and waits for; always the same ones."""
        made = cls.__new__(cls)
        made._read = read
        return made

    @property
    def grad_norm(self) -> float:
        """L2 norm of the mean gradient before clipping."""
        return self._read()[0]

    @property
    def finite(self) -> bool:
        """False: the gradient had NaN or inf, so nothing was changed."""
        return self._read()[1]

    @property
    def step(self) -> int:
        """Optimizer steps of this adapter so far."""
        return self._read()[2]

    def __eq__(self, other: object) -> bool:
        return self._read() == other._read() if isinstance(other, SlotStep) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._read())

    def __repr__(self) -> str:
        return f"SlotStep(grad_norm={self.grad_norm!r}, finite={self.finite!r}, step={self.step!r})"


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a slot's leaves lie. Another object once any of them moved."""

    addresses: Sequence[int]
    device: torch.device
    fp32: bool
    """Whether all leaves are contiguous fp32."""


class Slot:
    """One adapter in an optimizer. `state`: for each of the rule's `state_names` one vector over all leaves, in their order."""

    def __init__(self, name: str, config: OptimizerConfig, leaves: Mapping[str, nn.Parameter], structure: int) -> None:
        self.name, self.config, self.leaves = name, config, leaves
        self.structure = structure
        """The bank's structure count for which `leaves` were looked up."""
        self.parameters = tuple(leaves.values())
        self.sizes = [leaf.numel() for leaf in self.parameters]
        self.state: tuple[Tensor, ...] = ()
        self._views: tuple[tuple[Tensor, ...], list[list[Tensor]]] = ((), [])
        self._step = 0
        self._last: SlotStep | None = None
        self._count: Tensor | None = None
        self.placement = Placement((), torch.device("meta"), False)
        """As `place` found it last."""

    @property
    def rule(self) -> Rule:
        return OPTIMIZERS[self.config.rule]

    # ---- steps ------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps so far. Waits for those that are under way on a GPU."""
        if self._last is not None:
            self._step, self._last = self._last.step, None
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step, self._last, self._count = value, None, None

    def count_on(self, device: torch.device) -> Tensor:
        """The steps as an int64 tensor (1,) on a GPU, where kernels count on."""
        if self._count is None or self._count.device != device:
            self._count = torch.full((1,), self.step, dtype=torch.int64, device=device)
        return self._count

    def counts_itself(self, last: SlotStep) -> None:
        """`last` was put on a GPU, which counts it in `count_on`'s tensor."""
        self._last = last

    # ---- tensors ----------------------------------------------------------------------------------------------------

    @property
    def state_views(self) -> list[list[Tensor]]:
        """For each state vector its part of every leaf, in the leaf's shape."""
        if self._views[0] is not self.state:
            views = [[part.view_as(p) for part, p in zip(self.parts(v), self.parameters, strict=True)] for v in self.state]
            self._views = (self.state, views)
        return self._views[1]

    def parts(self, vector_n: Tensor) -> Sequence[Tensor]:
        """What of a vector over all leaves belongs to each of them."""
        return vector_n.split(self.sizes)

    def ready_state(self) -> None:
        """Make the state at the first step, and let it follow the leaves to another device."""
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        if not self.state:
            self.state = tuple(torch.zeros(sum(self.sizes), device=device, dtype=dtype) for _ in self.rule.state_names)
        elif self.state[0].device != device:
            self.state = tuple(vector.to(device) for vector in self.state)

    def place(self) -> None:
        """Look where the leaves lie now. Raises LorabankError where that is on several devices."""
        addresses = list(map(Tensor.data_ptr, self.parameters))
        if self.placement.addresses != addresses:
            device = self._one_device()
            fp32 = all(p.dtype == torch.float32 and p.is_contiguous() for p in self.parameters)
            self.placement = Placement(addresses, device, fp32)

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.parameters:
            leaf.grad = None

    def _one_device(self) -> torch.device:
        first = self.parameters[0]
        other = next((key for key, leaf in self.leaves.items() if leaf.device != first.device), None)
        if other is not None:
            raise LorabankError(
                f"adapter {self.name!r} lies on several devices ({first.device}, and {self.leaves[other].device} for {other}), "
                "which the optimizer can't step yet. Load the base on one device."
            )
        return first.device
