"""`TrainingPass`: forward and backward for a loop of one's own: any model, any loss, captured as the engine's passes are.

A step of few tokens is bound by the host, which starts thousands of kernels. Where the model's blocks are compiled for a GPU, a
batch shape that comes again is captured as a CUDA graph and replayed (graphs.py). What a replay reads are the batch's tensors and
the route's tables; which tables a model asks for (an encoder's tokens, a decoder's) is seen in the passes before.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.routing import BASE, Routing, RowRoute, Size
from lorabank.engine.attention import own_attention
from lorabank.engine.compiled import fused_blocks, left_out, saved_paths, takes_tables
from lorabank.engine.compiling import give_up, repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.gradients import fresh_gradients, leaves_of
from lorabank.engine.graphs import PassGraphs, UnforeseenError
from lorabank.engine.head import end_addresses
from lorabank.engine.modes import step_mode
from lorabank.engine.parts import is_out_of_memory
from lorabank.errors import ConfigError, DataError
from lorabank.kernels.tables import RouteTables, send
from lorabank.notices import warn_once

ARRANGEMENTS = 4
"""Of the slots' rows, in a batch of one shape, that get a graph of their own, in which these rows are views."""
ROUTES = 64
"""Routings kept, with their tables on the device: batches of one shape and one route share theirs."""
Route = RowRoute | Sequence[RowRoute] | Routing


@dataclass(frozen=True)
class _Model:
    """What the bank's model is like, until it changes."""

    structure: int = -1
    """The bank's count."""
    blocks: Sequence[FusedBlock] = ()
    """Those that are compiled."""
    alone: bool = False
    """Whether adapted layers are in none of them."""
    only_alone: bool = False
    """Whether all are, so that no block asks for tables: convolutions, which follow the slots' rows."""
    parameters: Sequence[nn.Parameter] = ()
    """All of them, adapters' leaves too."""

    @property
    def trained(self) -> bytes:
        """Which parameters are trained; of thousands, before every pass."""
        return bytes([parameter.requires_grad for parameter in self.parameters])


@dataclass
class _Known:
    """What passes of one shape were seen to need."""

    sizes: tuple[Size, ...] = ()
    """Tables that were asked for."""
    settled: bool = False
    """Whether a pass has shown them: blocks ask for none until each of their layers has been reached once."""
    arrangements: Counter[Hashable] = field(default_factory=Counter)
    """Of the slots' rows: how often each was met."""
    chosen: set[Hashable] = field(default_factory=set)
    """Those that get a graph of their own."""
    others: dict[int, nn.Parameter] = field(default_factory=dict)
    """By id: what gets a gradient beside adapters, such as a head that is trained too."""

    def arranged(self, routing: Routing) -> Hashable:
        """Where each slot's rows are, if they get a graph of their own; None: they follow the route, as numbers.

        They do where each slot has them side by side, and comes so again: a layer outside of compiled blocks takes such rows as a
        view, and all slots' in one product.
        """
        parts = [part for units in sorted(routing.plans) for part in routing.plans[units]]
        if not all(isinstance(part.rows, slice) for part in parts):
            return None
        found = tuple((part.slot, part.units[0], len(part.units)) for part in parts if part.units)
        if found not in self.chosen and len(self.chosen) < ARRANGEMENTS and len(self.arrangements) < ROUTES:
            self.arrangements[found] += 1
            if self.arrangements[found] > 1:
                self.chosen.add(found)
        return found if found in self.chosen else None

    def state(self, model: _Model) -> Hashable:
        """With what is trained, and the addresses that a graph holds on to."""
        places = tuple((block, block.addresses) for block in model.blocks)
        others = tuple((leaf.data_ptr(), leaf.requires_grad) for leaf in self.others.values())
        return self.sizes, places, others, model.trained


@dataclass
class TrainingPass:
    """`train(batch, route)`: one forward and one backward over the bank's model, on any device."""

    bank: AdapterBank
    loss_of: Callable[[Mapping[str, Tensor]], Tensor]
    """The batch on the model's device → a loss (), or one a row (N,), whose sum is differentiated.

    Where passes are captured, only the batch's tensors and the route change from call to call: a Python number in here is frozen.
    """
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward, as in `Engine`."""
    base_dropout: bool = False
    """Keep the base's own dropout; passes aren't captured then."""
    cuda_graphs: bool = True
    """Capture passes of a shape that comes again, where the model's blocks are compiled for a GPU."""
    masks: bool = True
    """Whether an attention may get a mask, as in most models of text; a GPU may use cuDNN's attention where none does."""
    after_backward: Callable[[Sequence[nn.Parameter]], None] | None = None
    """Gets the leaves once they hold this pass's gradients alone; passes aren't captured then."""
    graphs: PassGraphs = field(init=False, repr=False)
    _model: _Model = field(init=False, default_factory=_Model, repr=False)
    _known: dict[Hashable, _Known] = field(init=False, default_factory=dict, repr=False)
    _routes: OrderedDict[Hashable, Routing] = field(init=False, default_factory=OrderedDict, repr=False)
    _given_up: bool = field(init=False, default=False, repr=False)
    """Whether blocks were compiled, and their kernels didn't run."""
    _nested: tuple[int, dict[Any, Routing]] = field(init=False, default=(-1, {}), repr=False)
    """The bank's structure count, and routes that `loss_of` puts in force itself, which graphs read."""

    def __post_init__(self) -> None:
        self.graphs = PassGraphs("TrainingPass(cuda_graphs=False)")

    def __call__(self, batch: Mapping[str, Tensor], route: Route) -> Tensor:
        """`loss_of`'s loss, () or (N,), detached, on the device. Adds its sum's gradients to the leaves, adapters' and others.

        `batch`: tensors of any shapes, moved to the model's device. `route`: as `bank.route` takes it, for all rows, one a row of
        what the model gets, or a Routing (which isn't captured). LoRA's own dropout isn't drawn unless that says so.

        Raises DataError for what is no batch of tensors, RoutingError or AdapterNameError for a route that doesn't fit,
        ConfigError for another kind of loss; gradients are then as they were.
        """
        tensors = _checked(batch)
        given = [send(tensor, self.bank.device) for tensor in tensors.values()]
        try:
            return self._pass(tuple(tensors), given, route)
        except Exception as error:
            lacking = is_out_of_memory(error)
            if lacking and not self.graphs.any:
                raise
            if not lacking and not give_up(self.bank.model, error):  # of blocks whose kernels don't run on this GPU
                raise
            self._given_up |= not lacking
        self.graphs.drop()  # here, where the error holds the pass's memory no longer
        torch.cuda.empty_cache()
        return self._pass(tuple(tensors), given, route)

    def _pass(self, names: tuple[str, ...], given: list[Tensor], route: Route) -> Tensor:
        bank, shape = self.bank, tuple((name, tensor.shape, tensor.dtype) for name, tensor in zip(names, given, strict=True))
        routing, plain = self._routing(route, shape)
        if not plain or not self._capturable(routing):
            return self._run(dict(zip(names, given, strict=True)), routing, None)
        seen, units = self._model, tuple(routing.plans)
        own = _Identical(self.loss_of), self.gradient_checkpointing
        key = (bank.structure, bank.device, routing.names, routing.per, units, shape, own, end_addresses(bank.model))
        known = self._known.setdefault(key, _Known())
        arrangement = known.arranged(routing) if seen.alone else None
        follows = seen.alone and arrangement is None
        rows = routing.slot_rows(bank.device) if follows else []
        key = (key, arrangement)

        def inputs() -> list[Tensor]:
            tables = [routing.tables(*size[:2], bank.slot_numbers, *size[2:]) for size in known.sizes]
            return [*given, *(tensor for table in tables if table is not None for tensor in table.tensors), *rows]

        def compute(now: Sequence[Tensor]) -> Tensor:
            batch, rest = dict(zip(names, now, strict=False)), list(now[len(names) :])
            if not torch.cuda.is_current_stream_capturing():
                return self._run(batch, routing, known)
            tables = {size: RouteTables(*(rest.pop(0) for _ in range(4))) for size in known.sizes}
            return self._run(batch, routing.following(tables, rest if follows else () if seen.alone else None), known)

        before, fresh = known.state(seen), not known.settled
        if not fresh:
            loss = self.graphs.run((key, before), inputs(), lambda: [*self._leaves(routing), *known.others.values()], compute)
        else:
            loss = compute(given)
            known.settled = bool(known.sizes) or seen.only_alone
        if known.settled and ((after := known.state(seen)) != before or fresh):
            self.graphs.seen((key, after), inputs())
        return loss

    def _run(self, batch: Mapping[str, Tensor], routing: Routing, known: _Known | None) -> Tensor:
        """`known`: where to note what the pass needs."""
        model, drawn = self.bank.model, torch.get_rng_state()
        mode = step_mode(self.bank, gradient_checkpointing=self.gradient_checkpointing, base_dropout=self.base_dropout)
        # transformers looks at what masks hide, but not in a capture
        ours, blind = self.masks and _on_gpu(self.bank.device), known is not None
        attention = own_attention(model.modules(), self.bank.device, blind=blind) if ours else contextlib.nullcontext()
        with mode, attention, self.bank.route(routing), torch.enable_grad():
            loss = self.loss_of(batch)
            if not isinstance(loss, Tensor) or loss.ndim > 1 or not loss.is_floating_point():
                got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError(f"loss_of: expected a scalar or one number a row, a float tensor () or (N,), got {got}.")
            leaves = self._all_leaves(loss, routing, known)
            if loss.requires_grad:
                with fresh_gradients(leaves):
                    loss.sum().backward()
                    if self.after_backward is not None:
                        self.after_backward(leaves)
        if known is not None:
            settled = known.settled  # what a first pass draws may be for something that it sets up
            known.sizes += tuple(size for size in routing.sizes if size not in known.sizes)
            if settled and self.graphs.refused is None and not torch.equal(drawn, torch.get_rng_state()):
                self.graphs.refuse("random numbers are drawn on the host, and a replay would draw none")
        return loss.detach()

    def _all_leaves(self, loss: Tensor, routing: Routing, known: _Known | None) -> list[nn.Parameter]:
        """All that backward may give a gradient; `known` notes what of it isn't the route's adapters'."""
        leaves = {id(leaf): leaf for leaf in self._leaves(routing)}
        others = {id(leaf): leaf for leaf in leaves_of(loss) if id(leaf) not in leaves}
        if known is not None:
            if torch.cuda.is_current_stream_capturing() and not others.keys() <= known.others.keys():
                raise UnforeseenError("a leaf that got no gradient in passes before")
            known.others |= others
            others = known.others
        return [*leaves.values(), *others.values()]

    def _leaves(self, routing: Routing) -> list[nn.Parameter]:
        return [leaf for name in sorted(routing.names) for leaf in self.bank.parameters(name)]

    def _routing(self, route: Route, shape: Hashable) -> tuple[Routing, bool]:
        """(the routing, whether it is of one adapter a row), kept for each shape, so that its tables are those that it needs."""
        if isinstance(route, Routing):
            return route, False
        rows = tuple(route) if isinstance(route, Sequence) and not isinstance(route, str) else (route,)
        if not all(isinstance(row, str) or row is BASE for row in rows):
            return self.bank.routing(route, exact=False), False
        structure = self.bank.structure
        key = (structure, self.bank.device, rows == (route,), rows, shape)
        if key not in self._routes:
            if self._nested[0] != structure:
                self._nested = structure, {}
            self._routes[key] = replace(self.bank.routing(route, exact=False), nested=self._nested[1])
            if len(self._routes) > ROUTES:
                self._routes.popitem(last=False)
        self._routes.move_to_end(key)
        return self._routes[key], True

    def _capturable(self, routing: Routing) -> bool:
        """Whether this pass can be one of those that are captured: in compiled blocks, and in layers that can follow a route."""
        if not self.cuda_graphs or self.base_dropout or self.after_backward is not None:
            return False
        if self.graphs.refused is not None or not _on_gpu(self.bank.device):
            return False
        seen, bank = self._model, self.bank
        if seen.structure != bank.structure or not seen.blocks or not all(block.in_place for block in seen.blocks):
            blocks, alone, layers = fused_blocks(bank, whole=False), left_out(bank), [*all_layers(bank), *saved_paths(bank)]
            only_alone = len(alone) == len(layers) > 0
            seen = self._model = _Model(bank.structure, blocks, bool(alone), only_alone, list(bank.model.parameters()))
            self._known.clear()
            self.graphs.forget()  # of other blocks, or slots
        if not seen.blocks and not self._given_up and repeated_blocks(bank.model):
            warn_once(
                f"TrainingPass: the blocks of {type(bank.model).__name__} aren't compiled, so passes run kernel by kernel, and "
                "small ones wait for the host. lorabank.engine.compiling.compile_blocks(model) compiles them; "
                "TrainingPass(cuda_graphs=False) silences this."
            )
        return (
            bool(seen.blocks)
            and not any(block.failed for block in seen.blocks)
            and takes_tables(routing)
            and not torch.is_autocast_enabled(self.bank.device.type)
        )


class _Identical:
    """Equal to itself alone, and kept as long as what it is a key of."""

    def __init__(self, of: object) -> None:
        self._of = of

    def __hash__(self) -> int:
        return id(self._of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and self._of is other._of


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _checked(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The batch in the order of its names. Raises DataError."""
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(f"batch: expected tensors by name, got {'none' if isinstance(batch, Mapping) else type(batch).__name__}.")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise DataError(f"batch[{name!r}]: expected a tensor, got {got}. What all batches share belongs into loss_of.")
        if value.numel() == 0 or value.requires_grad:
            raise DataError(
                f"batch[{name!r}]: {'requires a gradient' if value.numel() else 'has no elements'}, {tuple(value.shape)}."
            )
    return {name: batch[name] for name in sorted(batch)}
