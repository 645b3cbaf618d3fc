"""`SlotOptimizer`: one optimizer for all adapters of a bank, each with its own rule, numbers, step count and state.

A slot's state is one vector over its leaves for each name. `plain.py` steps one slot after the other, on any device; `gpu.py`
steps all slots together on a GPU, without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.errors import CheckpointError, ConfigError, LorabankError, closest
from lorabank.optim import gpu, plain
from lorabank.optim.slots import OptimizerConfig, Slot, SlotStep

__all__ = ["OptimizerConfig", "SlotOptimizer", "SlotStep"]


class SlotOptimizer:
    """State exists only for a slot's own leaves. A step of some slots leaves every other slot and its state byte-identical."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._slots: dict[str, Slot] = {}
        self._gpu = gpu.GpuSteps()

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that this optimizer trains."""
        return tuple(self._slots)

    def add(self, name: str, config: OptimizerConfig | None = None) -> None:
        """Start optimising an adapter of the bank, from step 0."""
        leaves = dict(self._bank.named_parameters(name))
        self._slots[name] = Slot(name, config or OptimizerConfig(), leaves, self._bank.structure)

    def remove(self, name: str) -> None:
        """Forget an adapter and its state."""
        self._known(name)
        del self._slots[name]

    def config(self, name: str) -> OptimizerConfig:
        """How an adapter is optimised."""
        return self._known(name).config

    def make_room(self, names: Iterable[str]) -> None:
        """Allocate the state that the first step of these adapters needs: before passes fill the memory, not after."""
        for name in names:
            slot = self._slot(name)
            slot.place()
            slot.ready_state()

    def steps(self, name: str) -> int:
        """Optimizer steps that an adapter has made. Waits for one that is under way on a GPU."""
        return self._known(name).step

    def step(self, learning_rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
        """One step of the adapters in `learning_rates`; others are left alone.

        Gradients are sums over tokens: they are divided by the adapter's own `tokens` (Σ of token weights since its last step),
        clipped by its own norm, and cleared. A leaf that no row reached counts as gradient zero. An adapter whose gradient isn't
        finite is not stepped. Raises before anything changes: LorabankError for an adapter without any gradient, ConfigError for
        token weights that don't sum to a number above zero.

        AdamW on fp32 leaves on a GPU with Triton steps all adapters together and returns at once: what comes back waits for the
        GPU when it is looked at, as do `steps` and `state`. Other rules wait for the GPU once an adapter.
        """
        slots = {name: self._slot(name) for name in learning_rates}
        together: dict[torch.device, list[Slot]] = {}
        for slot in slots.values():
            _check_ready(slot, tokens)
            slot.place()
            if gpu.suits(slot):
                together.setdefault(slot.placement.device, []).append(slot)
        done: dict[str, SlotStep] = {}
        with torch.no_grad():
            for mine in together.values():
                done |= self._gpu.step(mine, learning_rates, tokens)
            for name, slot in slots.items():
                if name not in done:
                    done[name] = plain.step(slot, float(learning_rates[name]), float(tokens[name]))
        return {name: done[name] for name in slots}

    def zero_grad(self, name: str) -> None:
        """Drop an adapter's gradients."""
        self._slot(name).clear()

    def state(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """(steps, `<leaf>.<state name>` → tensor of the leaf's shape): all that a resumed run needs. Tensors are live views."""
        slot = self._slot(name)
        found: dict[str, Tensor] = {}
        if not slot.step:  # a GPU has state ready before it knows whether the first gradient is finite
            return 0, found
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
        slot.place()
        slot.step, slot.state = step, ()
        if step:
            device, dtype = slot.placement.device, slot.parameters[0].dtype
            slot.state = tuple(
                torch.cat([tensors[f"{key}.{what}"].to(device, dtype).reshape(-1) for key in slot.leaves])
                for what in slot.rule.state_names
            )

    def _known(self, name: str) -> Slot:
        if name not in self._slots:
            raise LorabankError(
                f"adapter {name!r} is not in this optimizer{closest(name, self._slots)}; call optimizer.add({name!r}) first"
            )
        return self._slots[name]

    def _slot(self, name: str) -> Slot:
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


def _check_ready(slot: Slot, tokens: Mapping[str, float]) -> None:
    name = slot.name
    given = tokens.get(name)
    if given is None or not math.isfinite(given) or given <= 0:
        raise ConfigError(
            f"optim_step: tokens[{name!r}]: expected Σ of its token weights since its last step, a number > 0, got {given!r}"
        )
    if all(leaf.grad is None for leaf in slot.parameters):
        raise LorabankError(f"optim_step: adapter {name!r} has no gradient. Call forward_backward with rows routed to it first.")
