"""A repeated block whose LoRA products are compiled into it.

What a call needs (which tokens use which slot, where the slots are) is looked up outside the compiled code, on every call, and
goes in as tensors. So a compiled block follows `bank.route`, `bank.use` and recomputation as a plain one does, and its code is
one for all blocks of a class. A call that the kernels don't take (mixtures) runs the block as it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.fused import LayerCall, LayerTables, LeafRange, entering
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import Routing
from lorabank.kernels.tables import DropTables, RouteTables

FEW = 64
"""A pass without gradients over fewer tokens runs plainly: a probe or a decoding step isn't worth code of its own."""
VARIANTS = 64
"""Compiled forms of one block class: all models of a process share them (with gradients or not, masks, ranks, families)."""
SLOTS = 8
"""Tables are made for a multiple of so many slots: few sizes, whatever the bank holds."""


@dataclass(frozen=True)
class BlockBatch:
    """A batch's route as the layers of a block get it."""

    tables: RouteTables
    drops: DropTables | None
    rows_U: Tensor
    """See `LayerCall`."""


class FusedBlock:
    """What `block(...)` calls instead of the block's own code, once it is compiled."""

    def __init__(self, block: nn.Module, *, kept: float = 1.0, backend: str = "inductor") -> None:
        """`kept`: share of the activations that are kept for backward, from 1 (as many as help) to 0 (the block's inputs).
        Below 1 gated MLPs don't keep their middle.

        `backend`: of torch.compile.
        """
        from lorabank.kernels.gpu.grouping import grouping  # here, since it imports Triton

        self.block = block
        self.kept = kept
        self.recompute = False
        """Whether to keep only the block's inputs and compute it again in backward."""
        self._compiled = torch.compile(block._call_impl, backend=grouping(backend, mlps=kept < 1))
        self._lock = threading.Lock()
        self._bank: AdapterBank | None = None
        self._structure = -1
        self._layers: list[LoRALayer] = []
        self._tables: list[LayerTables] = []

    @property
    def in_place(self) -> bool:
        """Whether the block still calls this."""
        return self.block._compiled_call_impl is self

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the block's tensors lie: others once the model was moved or cast."""
        bases = (tensor.data_ptr() for tensor in itertools.islice(self.block.parameters(), 1))
        return (*bases, *(layer.store.buffers[0].data_ptr() for layer in self._layers[:1]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's outputs."""
        run = self._chosen(args)
        if not self.recompute or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if any(isinstance(value, Cache) and value.get_seq_length() for value in (*args, *kwargs.values())):
            return run(*args, **kwargs)  # computing it again would append to the cache again
        args = tuple(_without_cache(value) for value in args)
        kwargs = {name: _without_cache(value) for name, value in kwargs.items()}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _chosen(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What computes this call: the compiled block under the route in force, or the plain one."""
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or not self._ready() or (not torch.is_grad_enabled() and x.numel() // x.shape[-1] < FEW):
            return self.block._call_impl
        if self._bank is None:
            return self._compiled
        routing = self._bank.route_in_force(self._layers[0].path)
        batch = None if routing is None else self._batch(self._bank, routing, x)
        if routing is None or batch is None:
            return self.block._call_impl  # its layers look the route up themselves

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._run(routing, batch, x, args, kwargs)

        return run

    def _run(self, routing: Routing, batch: BlockBatch, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x, calls = self._enter(routing, batch, x)
        _vary_lengths(x, args, kwargs)
        with self._lock:  # another thread may come to this block under another route
            for layer, call in zip(self._layers, calls, strict=True):
                layer.__dict__["call"] = call
            try:
                kept, limit = (
                    functorch_config.patch(activation_memory_budget=self.kept),
                    dynamo_config.patch(recompile_limit=VARIANTS),
                )
                with kept, limit:
                    return self._compiled(x, *args, **kwargs)
            finally:
                for layer in self._layers:
                    layer.__dict__["call"] = None

    def _ready(self) -> bool:
        """Bring the tables up to date with the bank. False while a layer has yet to be seen in a plain pass."""
        if self._bank is not None and self._bank.structure == self._structure:
            return True
        adapted = [module for module in self.block.modules() if isinstance(module, LoRALayer)]
        if not all(layer.reached for layer in adapted):
            return False
        layers = [layer for layer in adapted if layer.fusable]
        owner = layers[0].router if layers else None
        bank = owner if isinstance(owner, AdapterBank) else None
        if bank is not None:
            slots = slot_count(bank)
            self._tables = [layer.slot_tables(bank.slot_numbers, slots) for layer in layers]
            for table in self._tables:
                _vary(table.ranks_P2, table.scaling_P, table.kept_scaling_P, table.odds_P2)
            self._structure = bank.structure
        self._layers, self._bank = layers, bank  # last: another thread may look
        return True

    def _batch(self, bank: AdapterBank, routing: Routing, x: Tensor) -> BlockBatch | None:
        units = routing.units_of(x, self._layers[0].path)
        size = units, x.numel() // x.shape[-1] // units, bank.slot_numbers, slot_count(bank), x.device
        tables, drops = routing.tables(*size), routing.drops(*size)
        if tables is None:
            return None
        rows_U = torch.empty((x.shape[0], 0), device=x.device)
        _vary(*tables.tensors, *(() if drops is None else drops.tensors), rows_U)
        return BlockBatch(tables, drops, rows_U)

    def _enter(self, routing: Routing, batch: BlockBatch, x: Tensor) -> tuple[Tensor, list[LayerCall]]:
        bank = self._bank
        assert bank is not None  # `_chosen` asked for it
        buffers: list[Tensor] = []
        leaves: list[nn.Parameter] = []
        ranges: list[LeafRange] = []
        for layer in self._layers:
            for which, buffer in enumerate(layer.store.buffers):
                for name in routing.names & layer.slots.keys():
                    tensors = layer.slots[name].tensors
                    leaves.append(tensors.B_RO if which else tensors.A_RI)
                    ranges.append(LeafRange(len(buffers), tensors.start, tensors.stop))
                buffers.append(buffer)
        x, *entered = entering(x, buffers, leaves, ranges, bank.structure, lambda: bank.structure)
        _vary(*entered)
        return x, [
            layer.call_for(entered[2 * i], entered[2 * i + 1], self._tables[i], batch.tables, batch.rows_U, batch.drops)
            for i, layer in enumerate(self._layers)
        ]


def slot_count(bank: AdapterBank) -> int:
    """Slots that tables of this bank are made for."""
    return -(-(max(bank.slot_numbers.values(), default=0) + 1) // SLOTS) * SLOTS


def fused_blocks(bank: AdapterBank) -> list[FusedBlock]:
    """The model's fused blocks; none where an adapted layer's product isn't compiled into one of them."""
    found = [m._compiled_call_impl for m in bank.model.modules() if isinstance(m._compiled_call_impl, FusedBlock)]
    inside = {id(module) for fused in found for module in fused.block.modules() if isinstance(module, LoRALayer)}
    return found if all(layer.fusable and id(layer) in inside for layer in all_layers(bank)) else []


def takes_tables(routing: Routing) -> bool:
    """Whether a route is all in its tables: one slot a row, no weights."""
    return not any(part.weights_U is not None for plan in routing.plans.values() for part in plan)


def _without_cache(value: Any) -> Any:
    """A value for recomputation: an empty cache, which transformers makes unasked, is left out."""
    return None if isinstance(value, Cache) else value


def _vary(*tensors: Tensor) -> None:
    """Tell the compiler that the first size varies from call to call."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _vary_lengths(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Tell the compiler that rows and tokens of the block's inputs vary."""
    sizes = set(x.shape[:-1]) - {1}
    given = [value for group in (args, kwargs.values()) for value in group]
    inside = [part for value in given if isinstance(value, tuple) for part in value]
    for tensor in [x, *given, *inside]:
        if isinstance(tensor, Tensor):
            for dim, size in enumerate(tensor.shape[:-1] if tensor is x or tensor.is_floating_point() else tensor.shape):
                if size in sizes:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
