"""A repeated block whose LoRA products are compiled into it.

What a call needs (which tokens use which slot, where the slots are) is looked up outside the compiled code, on every call, and
goes in as tensors. So a compiled block follows `bank.route`, `bank.use` and recomputation as a plain one does, and its code is
one for all blocks of a class. A call that the kernels don't take (a mixture of adapters) runs the block as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lorabank.bank.bank import AdapterBank
from lorabank.bank.fused import LayerCall, LayerTables, LeafRange, TokenTables, entering
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import Routing
from lorabank.bank.storages.quantized import count_parameters
from lorabank.engine.borders import BlockBorders
from lorabank.engine.offload import Offload, storages
from lorabank.engine.parts import capturing, is_out_of_memory, stop_if_interrupted
from lorabank.engine.varying import vary, vary_lengths
from lorabank.kernels.gpu import runtime
from lorabank.notices import warn_once

FEW = 64
"""A pass without gradients over fewer tokens runs plainly: a probe or a decoding step isn't worth code of its own."""
VARIANTS = 64
"""Compiled forms of one block class: all models of a process share them (with gradients or not, masks, ranks, families)."""
WORTH_MORE = 40_000
"""Frozen weights for each number of a token's hidden state, from which on more than inputs is kept on the host.

An H100 does about 650e12 operations a second, two for each weight, and its bus moves 50e9 bytes: three tensors of two bytes a
number cross it while a block computes if there are so many weights. An 8B model's blocks have 53,000, a 3B model's 33,000.
"""


class FusedBlock:
    """What `block(...)` calls instead of the block's own code, once it is compiled."""

    def __init__(self, block: nn.Module, *, kept: str = "products", borders: bool = True, backend: str = "inductor") -> None:
        """`kept`: what is kept for backward, a name in `kernels/gpu/grouping.py`'s `KEEPS`.

        `borders`: put LoRA into the weights' borders (borders.py). `backend`: of torch.compile.
        """
        from lorabank.kernels.gpu.grouping import grouping  # here, since it imports Triton

        self.block = block
        self.kept = kept
        self.borders = borders
        self.recompute = False
        """Whether to keep only the block's inputs and compute it again in backward: what of it backward needs, at least."""
        self.offload: Offload | None = None
        """Where they are kept then, with what attention gave if the bus has the time for it; None: on the device."""
        self._compiled = torch.compile(block._call_impl, backend=grouping(backend, kept))
        self._recomputing = torch.compile(block._call_impl, backend=grouping(backend, "inputs"))
        self._offloading = torch.compile(block._call_impl, backend=grouping(backend, "attention"))
        self._input = next(iter(inspect.signature(block.forward).parameters), "")
        self.failed = False
        """Whether torch.compile turned out not to be able to compile this block."""
        self._lock = threading.Lock()
        self._bank: AdapterBank | None = None
        self._owner: AdapterBank | None = None
        """The bank, also where no layer of this block is computed in it."""
        self._left_plain = False
        """`stays_plain`, for the bank's present adapters."""
        self._structure = -1
        self._waited: tuple[weakref.ref[Any], int] | None = None
        """The bank, and its structure count, at a call that was left to the plain block, which shows what layers it reaches."""
        self._layers: list[LoRALayer] = []
        self._tables: list[LayerTables] = []
        self._borders = BlockBorders()
        self._table_of: dict[int, LayerTables] = {}
        """By a layer's id, for the borders."""
        self._own: tuple[tuple[int, ...], frozenset[int]] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the block still calls this."""
        return self.block._compiled_call_impl is self

    @property
    def stays_plain(self) -> bool:
        """Whether what is adapted (convolutions alone, or layers in windows) would be breaks that cost more than they save."""
        used = [layer for layer in self.block.modules() if isinstance(layer, LoRALayer) and layer.in_use]
        return bool(used) and (all(layer.kind.kernel(layer.base) for layer in used) or any(layer.windowed for layer in used))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the block's tensors lie: others once the model was moved or cast."""
        return (
            self._first_address(),
            *(layer.store.buffers[0].data_ptr() for layer in self._layers[:1]),
            *self._borders.addresses,
        )

    def _first_address(self) -> int:
        """Of the block's first parameter, along its path: `parameters()` takes long, and this is asked before every pass."""
        module = self.block
        *path, name = self._first
        for part in path:
            module = module._modules.get(part) or module
        parameter = module._parameters.get(name)
        if parameter is None:  # modules were replaced by others
            self.__dict__.pop("_first", None)
            parameter = next(self.block.parameters(), None)
        return 0 if parameter is None else parameter.data_ptr()

    @functools.cached_property
    def _first(self) -> list[str]:
        return next((name for name, _ in self.block.named_parameters()), "").split(".")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's outputs."""
        if not args and self._input in kwargs:
            args, kwargs = (kwargs[self._input],), {name: value for name, value in kwargs.items() if name != self._input}
        again = self.recompute and torch.is_grad_enabled()
        cached = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if cached and not torch.is_grad_enabled():  # each block has a place of its own there, and would get a form of its own
            return self.block._call_impl(*args, **kwargs)
        more = again and self.offload is not None and self._worth_more(args)
        recomputing = self._offloading if more else self._recomputing
        run, plain = self._chosen(args, kwargs, recomputing if again else self._compiled)
        if not again:
            if cached and not plain:
                warn_once(
                    "compile: the model is called with a cache in a pass with gradients, so each block is compiled by itself, "
                    "which takes long. Call it with use_cache=False."
                )
            return run(*args, **kwargs)
        if cached and any(cache.get_seq_length() for cache in cached):
            return run(*args, **kwargs)  # computing it again would append to the cache again
        args = tuple(_without_cache(value) for value in args)
        kwargs = {name: _without_cache(value) for name, value in kwargs.items()}
        if self.offload is None:
            return (self._checkpointed if plain else _as_it_is)(run, *args, **kwargs)
        if plain:
            return self.offload.around(self._checkpointed)(run, *args, **kwargs)
        return self.offload.around(_as_it_is, self._lasting() if more else None)(run, *args, **kwargs)

    @functools.cached_property
    def _weights(self) -> int:
        return count_parameters(self.block, (p for p in self.block.parameters() if not p.requires_grad))

    def _worth_more(self, args: tuple[Any, ...]) -> bool:
        """Whether this call takes long enough for more than its input to cross the bus meanwhile."""
        return bool(args) and isinstance(args[0], Tensor) and self._weights >= WORTH_MORE * args[0].shape[-1]

    def _lasting(self) -> frozenset[int]:
        """Where the block's own tensors lie, which no call of it makes."""
        state = (*self.addresses, self._structure)
        if self._own is None or self._own[0] != state:
            stored = [t for layer in self._layers for t in (*layer.stored(), *layer.store.buffers)]
            self._own = state, storages([*self.block.parameters(), *self.block.buffers(), *stored, *self._borders.tensors])
        return self._own[1]

    def _checkpointed(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A plain block, computed again in backward."""
        # a route for layers that look theirs up: on a GPU backward runs in a thread that knows of none
        context = self._owner.checkpoint_context if self._owner is not None else _no_contexts
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context, **kwargs)

    def _chosen(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiled: Callable[..., Any]
    ) -> tuple[Callable[..., Any], bool]:
        """(what computes this call, whether that is the plain block): `compiled` under the route in force where that can be."""
        x = args[0] if args and isinstance(args[0], Tensor) else None
        with torch.inference_mode(False):  # what is made here outlives this call, and a pass with gradients may come
            ready = x is not None and not self.failed and self._ready()
        few = x is not None and not torch.is_grad_enabled() and x.numel() // x.shape[-1] < FEW
        if x is None or not ready or few or self._left_plain:
            return self.block._call_impl, True
        why = runtime.missing(x.device) or runtime.refused(x.device, x.dtype)
        if why is not None:
            return self._plain(f"gets inputs on {x.device} that it isn't compiled for: {why}")
        if torch.is_autocast_enabled(x.device.type):
            return self._plain("doesn't take autocast in its compiled form: convert the model (model.to(torch.bfloat16)) instead")
        if self._bank is None:
            return functools.partial(self._bare, compiled), False
        routing = self._bank.route_in_force(self._layers[0].path)
        inputs = [] if routing is None else [x, *_other_inputs(routing, x, (*args, *kwargs.values()))]
        with torch.inference_mode(False):
            batch = None if routing is None else self._batch(self._bank, routing, inputs)
        if routing is None:
            return self.block._call_impl, True
        if batch is None:  # its layers look the route up themselves
            return self._plain("doesn't take a mixture of adapters for a row in its compiled form")
        tables, rows_U = batch

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._run(compiled, routing, tables, rows_U, x, args, kwargs)

        return run, False

    def _plain(self, reason: str) -> tuple[Callable[..., Any], bool]:
        """The block as it is, and a warning about that, once for all blocks of a class."""
        warn_once(f"compile: {type(self.block).__name__} {reason}. It runs uncompiled there: the same results, slower.")
        return self.block._call_impl, True

    def _run(
        self,
        compiled: Callable[..., Any],
        routing: Routing,
        tables: tuple[TokenTables, ...],
        rows_U: Tensor,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        entered, calls = self._enter(routing, tables, rows_U, x)
        vary_lengths(entered, args, kwargs)
        with self._lock:  # another thread may come to this block under another route
            for layer, call in zip(self._layers, calls, strict=True):
                vars(layer)["call"] = call
            try:
                with self._compiling(), torch.cuda.device_of(entered):  # where dynamo is told to run it eagerly
                    return compiled(entered, *args, **kwargs)
            finally:
                for layer in self._layers:
                    vars(layer)["call"] = None
        return self.block._call_impl(x, *args, **kwargs)

    def _bare(self, compiled: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A block without adapters."""
        vary_lengths(x, args, kwargs)
        with self._compiling():
            return compiled(x, *args, **kwargs)
        return self.block._call_impl(x, *args, **kwargs)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """The settings of torch.compile for this block. Ends quietly where it can't compile the block: then it runs plainly."""
        try:
            with dynamo_config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
                yield
        except FailOnRecompileLimitHit:
            if capturing():
                raise
            warn_once(
                f"compile: {type(self.block).__name__} is compiled in {VARIANTS} forms by now (for other ranks, masks, dtypes or "
                "models), so calls of further ones run uncompiled: the same results, slower. compile: false silences this."
            )
        except TorchDynamoException as error:
            stop_if_interrupted(error)
            if is_out_of_memory(error) or capturing():
                raise  # a smaller pass compiles, and so does one that isn't being captured
            self.failed = True
            self._borders.release()
            reason = " ".join(str(error).split("\n")[:2])[:300]
            warn_once(
                f"compile: torch can't compile {type(self.block).__name__}, so it runs uncompiled: the same results, slower "
                f"({type(error).__name__}: {reason}). compile: false silences this."
            )

    def _ready(self) -> bool:
        """Bring the tables up to date with the bank. False while a layer has yet to be seen in a plain pass."""
        if self._bank is not None and self._bank.structure == self._structure and not self._moved():
            self._prepare_borders()
            return True
        adapted = [module for module in self.block.modules() if isinstance(module, LoRALayer)]
        if missed := [layer for layer in adapted if not layer.reached]:
            self._wait(missed)
            return False
        self._left_plain = self.stays_plain
        layers = [layer for layer in adapted if layer.fusable and not self._left_plain]
        for layer in adapted:
            if layer.in_use and layer.alone is not None and not self._left_plain:
                name = layer.path.rpartition(".")[2]
                warn_once(f"compile: layers {name!r} are left out of their compiled blocks, slower: {layer.alone}")
        owner = adapted[0].router if adapted else None
        self._owner = owner if isinstance(owner, AdapterBank) else None
        bank = self._owner if layers else None
        if bank is not None:
            slots = bank.table_slots
            self._tables = [layer.slot_tables(bank.slot_numbers, slots) for layer in layers]
            for table in self._tables:
                vary(table.ranks_P2, table.scaling_P, table.kept_scaling_P, table.odds_P2)
            self._structure = bank.structure
            with self._lock:
                self._table_of = {id(layer): table for layer, table in zip(layers, self._tables, strict=True)}
                if self.borders:
                    self._borders.find(layers, bank.model)
        else:
            self.release()  # the bank was taken out of the model
        self._layers, self._bank = layers, bank  # last: another thread may look
        self._prepare_borders()
        return True

    def _moved(self) -> bool:
        """Whether the model is on another GPU than the tables."""
        return bool(self._layers) and self._tables[0].ranks_P2.device != self._layers[0].store.device

    def _wait(self, missed: Sequence[LoRALayer]) -> None:
        """Leave a call to the plain block; not the first such call says so, since others may follow."""
        router = missed[0].router
        now = weakref.ref(router), router.structure
        if self._waited == now:
            name = missed[0].path.rpartition(".")[2]
            warn_once(
                f"compile: no call of {type(self.block).__name__} has reached its layer {name!r} so far, so it runs uncompiled "
                "until one has: the same results, slower. exclude=[...] leaves such layers out of targets."
            )
        self._waited = now

    def release(self) -> None:
        """Leave the block's weights as they were found."""
        with self._lock:
            self._borders.release()

    def _batch(
        self, bank: AdapterBank, routing: Routing, inputs: Sequence[Tensor]
    ) -> tuple[tuple[TokenTables, ...], Tensor] | None:
        """The route as tables for each of the block's inputs; None where it isn't all in tables."""
        found: list[TokenTables] = []
        for x in inputs:
            units = routing.units_of(x, self._layers[0].path)
            size = units, x.numel() // x.shape[-1] // units, bank.slot_numbers, bank.table_slots, x.device
            tables = routing.tables(*size)
            if tables is None:
                return None
            found.append(TokenTables(tables, routing.drops(*size)))
        rows_U = torch.empty((inputs[0].shape[0], 0), device=inputs[0].device)
        vary(rows_U, *(table for tables in found for table in tables.tensors))
        return tuple(found), rows_U

    def _enter(
        self, routing: Routing, tables: tuple[TokenTables, ...], rows_U: Tensor, x: Tensor
    ) -> tuple[Tensor, list[LayerCall]]:
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
        vary(*entered)
        calls = [
            layer.call_for(entered[2 * i], entered[2 * i + 1], self._tables[i], tables, rows_U)
            for i, layer in enumerate(self._layers)
        ]
        return x, self._with_borders(calls)

    def _with_borders(self, calls: list[LayerCall]) -> list[LayerCall]:
        places = {id(layer): i for i, layer in enumerate(self._layers)}
        with self._lock, torch.inference_mode(False):
            filled = self._borders.fill(self._table_of)
        for layer, storage, more, within in filled:
            vary(more[1], more[2])
            torch._dynamo.maybe_mark_dynamic(more[0], within[0])
            place = places[id(layer)]
            calls[place] = replace(calls[place], storage=storage, more=more, within=within)
        return calls

    def _prepare_borders(self) -> None:
        """Move weights before anything looks at where they are."""
        with self._lock:
            self._borders.prepare(self._table_of)


def _no_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _as_it_is(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)


def _other_inputs(routing: Routing, x: Tensor, given: Sequence[Any]) -> list[Tensor]:
    """Inputs with the same rows as x and another number of tokens, which layers of cross-attention read instead of x."""
    if routing.per == "token" or x.ndim != 3:  # a route by token is about x's tokens alone
        return []
    found: dict[int, Tensor] = {}
    for value in given:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[0] == x.shape[0]:
            found.setdefault(value.shape[1], value)
    return [value for length, value in found.items() if length != x.shape[1]]


def _without_cache(value: Any) -> Any:
    """A value for recomputation: an empty cache, which transformers makes unasked, is left out."""
    return None if isinstance(value, Cache) else value
