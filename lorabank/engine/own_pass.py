"""`TrainingPass`: forward and backward for a loop of one's own: any model, any loss, captured as the engine's passes are.

A step of few tokens is bound by the host, which starts thousands of kernels. Where the model's blocks are compiled for a GPU, a
batch shape that comes again is captured as a CUDA graph and replayed (graphs.py). What a replay reads are the batch's tensors and
the route's tables; which tables a model asks for (an encoder's tokens, a decoder's) is seen in the passes before.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE, Routing, RowRoute, Size
from lorabank.engine.attention import own_attention
from lorabank.engine.compiling import give_up
from lorabank.engine.fused_block import FusedBlock, fused_blocks, left_out, takes_tables
from lorabank.engine.gradients import fresh_gradients, leaves_of
from lorabank.engine.graphs import PassGraphs
from lorabank.engine.modes import step_mode
from lorabank.engine.parts import is_out_of_memory
from lorabank.errors import ConfigError, DataError, RoutingError
from lorabank.kernels.tables import RouteTables, send

ROUTES = 64
"""Routings kept, with their tables on the device: batches of one shape and one route share theirs."""
Route = RowRoute | Sequence[RowRoute]


@dataclass
class _Known:
    """What passes of one shape were seen to need."""

    sizes: tuple[Size, ...] = ()
    """Tables that were asked for."""
    others: dict[int, nn.Parameter] = field(default_factory=dict)
    """By id: what gets a gradient beside adapters, such as a head that is trained too."""

    def state(self, blocks: Sequence[FusedBlock]) -> Hashable:
        """With the addresses that a graph holds on to."""
        places = tuple((block, block.addresses) for block in blocks)
        return self.sizes, places, tuple(leaf.data_ptr() for leaf in self.others.values())


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
    graphs: PassGraphs = field(init=False, repr=False)
    _blocks: tuple[int, Sequence[FusedBlock], bool] = field(init=False, default=(-1, (), False), repr=False)
    """The bank's structure count, its compiled blocks, and whether adapted layers are in none of them."""
    _known: dict[Hashable, _Known] = field(init=False, default_factory=dict, repr=False)
    _routes: OrderedDict[Hashable, Routing] = field(init=False, default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        self.graphs = PassGraphs("TrainingPass(cuda_graphs=False)")

    def __call__(self, batch: Mapping[str, Tensor], route: Route) -> Tensor:
        """`loss_of`'s loss, () or (N,), detached, on the device. Adds its sum's gradients to the leaves, adapters' and others.

        `batch`: tensors of any shapes, moved to the model's device. `route`: as `bank.route` takes it, for all rows or one a row.
        LoRA's own dropout isn't drawn. Raises DataError for what is no batch of tensors, RoutingError or AdapterNameError for a
        route that doesn't fit, ConfigError for another kind of loss; gradients are then as they were.
        """
        tensors = _checked(batch, route)
        given = [send(tensor, self.bank.device) for tensor in tensors.values()]
        try:
            return self._pass(tuple(tensors), given, route)
        except Exception as error:
            lacking = is_out_of_memory(error)
            if not lacking and not give_up(self.bank.model, error):  # of blocks whose kernels don't run on this GPU
                raise
            if not self.graphs.drop() and lacking:
                raise
        torch.cuda.empty_cache()
        return self._pass(tuple(tensors), given, route)

    def _pass(self, names: tuple[str, ...], given: list[Tensor], route: Route) -> Tensor:
        bank, shape = self.bank, tuple((name, tensor.shape, tensor.dtype) for name, tensor in zip(names, given, strict=True))
        routing, plain = self._routing(route, shape)
        if not plain or not self._capturable(routing):
            return self._run(dict(zip(names, given, strict=True)), routing, None)
        _, blocks, alone = self._blocks
        key = (bank.structure, bank.device, routing.names, routing.per, self.gradient_checkpointing, shape)
        known = self._known.setdefault(key, _Known())
        rows = routing.slot_rows(bank.device) if alone else []

        def inputs() -> list[Tensor]:
            tables = [routing.tables(*size[:2], bank.slot_numbers, *size[2:]) for size in known.sizes]
            return [*given, *(tensor for table in tables if table is not None for tensor in table.tensors), *rows]

        def compute(now: Sequence[Tensor]) -> Tensor:
            batch, rest = dict(zip(names, now, strict=False)), list(now[len(names) :])
            if not torch.cuda.is_current_stream_capturing():
                return self._run(batch, routing, known)
            tables = {size: RouteTables(*(rest.pop(0) for _ in range(4))) for size in known.sizes}
            return self._run(batch, routing.following(tables, rest if alone else None), known)

        before = known.state(blocks)
        if known.sizes:
            loss = self.graphs.run((key, before), inputs(), lambda: [*self._leaves(routing), *known.others.values()], compute)
        else:  # blocks ask for no tables until each of their layers has been reached once
            loss = compute(given)
        if known.sizes and (after := known.state(blocks)) != before:
            self.graphs.seen((key, after), inputs())
        return loss

    def _run(self, batch: Mapping[str, Tensor], routing: Routing, known: _Known | None) -> Tensor:
        """`known`: where to note what the pass needs."""
        model, drawn = self.bank.model, torch.get_rng_state()
        mode = step_mode(self.bank, gradient_checkpointing=self.gradient_checkpointing, base_dropout=self.base_dropout)
        # transformers looks at a mask, and leaves it out where it hides nothing, but not in a capture
        masked = known is not None and any("mask" in name for name in batch)
        attention = own_attention(model.modules(), self.bank.device, blind=True) if masked else contextlib.nullcontext()
        with mode, attention, self.bank.route(routing), torch.enable_grad():
            loss = self.loss_of(batch)
            if not isinstance(loss, Tensor) or loss.ndim > 1 or not loss.is_floating_point():
                got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError(f"loss_of: expected a scalar or one number a row, a float tensor () or (N,), got {got}.")
            leaves = {id(leaf): leaf for leaf in self._leaves(routing)}
            if known is not None:
                known.others |= {id(leaf): leaf for leaf in leaves_of(loss) if id(leaf) not in leaves}
                leaves |= known.others
            if loss.requires_grad:
                with fresh_gradients(list(leaves.values())):
                    loss.sum().backward()
        if known is not None:
            known.sizes += tuple(size for size in routing.sizes if size not in known.sizes)
            if self.graphs.refused is None and not torch.equal(drawn, torch.get_rng_state()):
                self.graphs.refuse("random numbers are drawn on the host, and a replay would draw none")
        return loss.detach()

    def _leaves(self, routing: Routing) -> list[nn.Parameter]:
        return [leaf for name in sorted(routing.names) for leaf in self.bank.parameters(name)]

    def _routing(self, route: Route, shape: Hashable) -> tuple[Routing, bool]:
        """(the routing, whether it is of one adapter a row), kept for each shape, so that its tables are those that it needs."""
        rows = tuple(route) if isinstance(route, Sequence) and not isinstance(route, str) else (route,)
        if not all(isinstance(row, str) or row is BASE for row in rows):
            return self.bank.routing(route, exact=False), False
        key = (self.bank.structure, self.bank.device, rows == (route,), rows, shape)
        if key not in self._routes:
            self._routes[key] = self.bank.routing(route, exact=False)
            if len(self._routes) > ROUTES:
                self._routes.popitem(last=False)
        self._routes.move_to_end(key)
        return self._routes[key], True

    def _capturable(self, routing: Routing) -> bool:
        """Whether this pass can be one of those that are captured: in compiled blocks, and in layers that can follow a route."""
        if not self.cuda_graphs or self.base_dropout or self.graphs.refused is not None or not _on_gpu(self.bank.device):
            return False
        structure, blocks, _ = self._blocks
        if structure != self.bank.structure or not blocks or not all(block.in_place for block in blocks):
            blocks = fused_blocks(self.bank, whole=False)
            self._blocks = self.bank.structure, blocks, bool(left_out(self.bank))
            self._known.clear()
        return bool(blocks) and takes_tables(routing) and not torch.is_autocast_enabled(self.bank.device.type)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _checked(batch: Mapping[str, Any], route: Route) -> dict[str, Tensor]:
    """The batch in the order of its names. Raises DataError, and RoutingError where a list can't be about its rows."""
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
    rows = len(route) if isinstance(route, Sequence) and not isinstance(route, str) else 0
    if rows and not any(tensor.ndim and len(tensor) == rows for tensor in batch.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise RoutingError(f"the route names {rows} rows, and no tensor of the batch has as many: {shapes}. Name one a row.")
    return {name: batch[name] for name in sorted(batch)}
