"""`LoRALayer`: a base layer where it stands in the model, with the adapters' changes of what it computes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, LayerSlot, Router, SlotParameters, SlotValues, vectors_of
from lorabank.bank.dense import dense_kind
from lorabank.bank.extra.extras import ROWS, add_rows, add_shifts, any_extras, fill, lora_bias_of
from lorabank.bank.fused import LayerCall, LayerTables, TokenTables, table_width
from lorabank.bank.init import initial, path_generator
from lorabank.bank.kinds import EMBEDDING, LayerKind, layer_kind
from lorabank.bank.kinds import LAYER_KINDS as LAYER_KINDS
from lorabank.bank.owners import OwnerWatch
from lorabank.bank.places import ids_of_rows
from lorabank.bank.routing import Routing, SlotRows
from lorabank.bank.slices import SliceCarrier, add_slice_biases
from lorabank.bank.starts.frozen import split
from lorabank.bank.starts.spectral import start_of_difference
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import Adapted, check_loaded
from lorabank.config.adapter import AdapterConfig
from lorabank.config.inits import is_difference
from lorabank.errors import AdapterFileError, RoutingError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.output_slice import OutputSlice
from lorabank.kernels import ops
from lorabank.kernels.mapped import add_mapped
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import output_norms
from lorabank.kernels.segments import Decomposition, DropoutDraw, Outputs, Segment, drop_threshold
from lorabank.kernels.tables import bits32
from lorabank.notices import warn_once


class LoRALayer(Adapted, Carrier):
    """A base layer with the bank's slots beside it."""

    def __init__(
        self, base: nn.Module, path: str, router: Router, rows_lost: str | None = None, *, beside_turned: bool = False
    ) -> None:
        """`rows_lost`: why the route can't follow this layer's input to the batch's rows, None when it can.

        `beside_turned`: attention beside this layer has its rows second, so this layer's input may have as well.
        """
        kind = layer_kind(base)
        if kind is None:
            raise TypeError(f"layer {path!r}: {type(base).__name__} can't be adapted")
        weight = base.get_parameter("weight")
        check_loaded(path, weight)
        store = RankStore(*kind.features(base), weight.device)
        super().__init__(base, path, {"": store})
        own = vars(self)
        own["kind"], own["store"] = kind, store
        own["held"] = kind.tensors(base._parameters) if kind.held else None
        own["slots"], own["slices"] = {}, {}
        own["reached"] = False
        own["read"] = 0
        own["call"] = None
        own["moved"] = False
        own["router"] = router
        own["rows_lost"], own["folded"], own["called"] = rows_lost, None, None
        own["beside_turned"] = beside_turned
        own["low_rank_map"] = kind.low_rank_map(base)
        own["_path_seed"] = zlib.crc32(path.encode())
        own["dense"] = False

    kind: LayerKind
    _path_seed: int
    slices: dict[str, SliceCarrier]
    """Projections of a fused layer that adapters change apart from the others, by name."""
    low_rank_map: LowRankMap
    dense: bool
    """Of a convolution in groups: whether the adapters' A sees all channels."""
    read: int
    """Identity of the last plain call's input, which layers of a module that read one x have in common."""
    rows_lost: str | None
    beside_turned: bool
    folded: OwnerWatch | None
    """Of the module that folds the batch's rows with what follows, ahead of this layer."""
    called: ContextVar[bool] | None
    """Set by a call, where the module above has other ways past this layer."""
    held: list[Tensor] | None
    """What the products take as their base, where that is made once."""
    moved: bool
    """Whether a compiled block keeps the base weight as a view of a wider tensor (engine/borders.py)."""
    call: LayerCall | None
    """Set by a compiled block around its call, for this layer's part in it."""

    def extra_repr(self) -> str:
        return f"{self.base!r}, slots={list(self.slots)}"

    def watch(self, folded: OwnerWatch | None, called: ContextVar[bool] | None) -> None:
        """Note what the modules above this layer tell of its input, and where its calls are to be told."""
        vars(self).update(folded=folded, called=called)

    def slot_tables(self, numbers: Mapping[str, int], slots: int) -> LayerTables:
        """Where each of the bank's slots is in this layer. `numbers`: adapter to its slot number, below `slots`."""
        ranks, scaling, kept = torch.zeros(slots, 2, dtype=torch.int32), torch.zeros(slots), torch.zeros(slots)
        odds = torch.zeros(slots, 2, dtype=torch.int64)
        for name, slot in self.slots.items():
            number = numbers[name]
            ranks[number, 0], ranks[number, 1] = slot.tensors.start, slot.rank
            scaling[number], kept[number] = slot.scaling, slot.scaling / (1.0 - slot.dropout)
            odds[number, 0], odds[number, 1] = (slot.seed ^ self._path_seed) & 0xFFFFFFFF, drop_threshold(slot.dropout)
        device, width = self.store.device, table_width(max(slot.rank for slot in self.slots.values()))
        return LayerTables(ranks.to(device), scaling.to(device), kept.to(device), bits32(odds).to(device), width)

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet."""
        if not rank:
            return self._without_ranks()
        self._take_form(dense=False)
        if is_difference(config.init):
            return self.difference(config, rank, scaling, path_generator(seed, self.path))
        size = self.store.in_features, self.store.out_features
        A, B = initial(config.init, rank, size, seed, self.path, looks_up=self.kind.storage == EMBEDDING)
        return SlotValues(A, B, None, config.use_dora, rank, scaling)

    def difference(
        self, config: AdapterConfig, rank: int, scaling: float, generator: torch.Generator, outputs: OutputSlice | None = None
    ) -> SlotValues:
        """Where an adapter of the layer, or of some of its outputs, begins whose change is the difference from there."""
        weight_OI = self.kind.weight_oi(self._parameters, torch.float32)
        if outputs is not None:
            weight_OI = weight_OI[outputs.rows.to(weight_OI.device)]
        A, B = start_of_difference(config, weight_OI, rank, scaling, generator)
        return SlotValues(A, B, None, False, rank, scaling, frozen=(A, B))

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, out of its layers by path."""
        if self.path not in layers:
            return self._without_ranks()
        mine = layers[self.path]
        self._take_form(dense=mine.dense)
        A, B, frozen = split(mine)
        decomposed, extras = mine.magnitude is not None, lora_bias_of(mine)
        return SlotValues(A, B, mine.magnitude, decomposed, len(A), mine.scaling, extras=extras, frozen=frozen)

    def _without_ranks(self) -> SlotValues:
        """Of an adapter that has only extras here."""
        return SlotValues(torch.zeros(0, self.store.in_features), None, None, False, 0, 1.0)

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaves. A magnitude that isn't given is the norm of what it has become."""
        super().write(name, values)
        slot = self.slots[name]
        tensors = slot.tensors
        with torch.no_grad():
            fill(self.base, tensors.extras, values.extras.values, slot.ids)
            if tensors.magnitude_O is not None:
                tensors.magnitude_O.copy_(self.norms(slot) if values.magnitude is None else values.magnitude)

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values here, on the CPU, by path."""
        slot, kernel, base = self.slots[name], self.kind.kernel(self.base), self.base
        if not slot.rank:
            return {}
        A, B, frozen_rank = self.pair(name)
        made = AdapterLayer(A, B, slot.scaling, looks_up=self.kind.storage == EMBEDDING, frozen_rank=frozen_rank)
        made = replace(made, **vectors_of(slot))
        if kernel:
            made = replace(made, A=A.view(len(A), -1, *kernel), groups=self.kind.groups(base), dense=self.dense)
        return {self.path: replace(made, attention=self.attends)}

    def _take_form(self, *, dense: bool) -> None:
        """Keep A of all channels, or of a group's. Raises AdapterFileError beside an adapter of the other form."""
        if dense == self.dense:
            return
        if self.slots:
            raise AdapterFileError(
                f"layer {self.path!r} is a convolution in groups. A of {', '.join(self.slots)} sees "
                f"{'all channels, as PEFT trains it, and' if self.dense else 'those of a group, and'} that of the new adapter "
                "doesn't see the same. Load them into banks of their own, over copies of the model."
            )
        own, plain = vars(self), layer_kind(self.base)
        assert plain is not None
        own["dense"], own["kind"] = dense, dense_kind(plain) if dense else plain
        own["low_rank_map"] = self.kind.low_rank_map(self.base)
        own["store"] = RankStore(*self.kind.features(self.base), self.store.device)
        self._modules["lora"] = SlotParameters({"": self.store})

    def _refresh(self) -> None:
        self._slot_parameters.refresh()

    def show(self) -> None:
        """Show the present leaves to trainers."""
        self._refresh()

    def slice(self, name: str, outputs: OutputSlice) -> SliceCarrier:
        """A projection of this layer, made when it is first asked for."""
        if name not in self.slices:
            self.slices[name] = SliceCarrier(self, name, outputs, self.router)
            self._slot_parameters.show(f"{name}_", self.slices[name].store)
        return self.slices[name]

    @property
    def attends(self) -> bool:
        """Whether it is a projection of an `nn.MultiheadAttention` that PEFT's files name by the module."""
        return False

    @property
    def in_use(self) -> bool:
        """Whether an adapter changes the layer, or a slice of it."""
        return bool(self.slots) or self._sliced

    @property
    def _sliced(self) -> bool:
        return any(carrier.slots for carrier in self.slices.values())

    def bring_home(self) -> None:
        """Make a moved base weight a tensor of its own again."""
        if self.moved:
            weight = self.base.get_parameter("weight")
            if weight.untyped_storage().nbytes() > weight.numel() * weight.element_size():  # nobody else has replaced it
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            vars(self)["moved"] = False

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALayer:
        self.base._apply(fn, recurse)  # into the dictionaries that are this layer's too
        device = self.base.get_parameter("weight").device
        for place in (self, *self.slices.values()):
            place.move(device)
        if self.held is not None and self.held[0].device != device:
            vars(self)["held"] = self.kind.tensors(self._parameters)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.moved and not keep_vars:  # what saves a view saves the adapters beside it in the wider tensor
            weight: Tensor = destination[f"{prefix}weight"]
            destination[f"{prefix}weight"] = weight.clone(memory_format=torch.contiguous_format)

    def stored(self) -> list[Tensor]:
        """The frozen weight as its products take it."""
        return self.kind.tensors(self._parameters) if self.held is None else self.held

    def call_for(self, A: Tensor, B: Tensor, tables: LayerTables, tokens: tuple[TokenTables, ...], rows_U: Tensor) -> LayerCall:
        """This layer's part in a call of a compiled block."""
        return LayerCall(A, B, tables, tokens, rows_U, self.kind.storage)

    @property
    def fusable(self) -> bool:
        """Whether a compiled block may compute this layer's product itself."""
        return bool(self.slots) and self.alone is None

    @property
    def alone(self) -> str | None:
        """Why a compiled block must leave the product to this layer itself, None where it need not."""
        if not self.kind.linear:
            return "it isn't a linear layer"
        if self._sliced:
            return "adapters change slices of it"
        if any(slot.shared for slot in self.slots.values()):
            return "its adapter's numbers are an embedding's"
        if any(slot.tensors.magnitude_O is not None for slot in self.slots.values()):
            return "an adapter there is decomposed (DoRA)"
        if any(slot.extras for slot in self.slots.values()):
            return "an adapter there trains a bias, or rows of its own"
        if any(slot.frozen is not None for slot in self.slots.values()):
            return "an adapter there is a difference from where it started"
        if not self.kind.in_blocks:
            return "its products are emulated"
        if self.beside_turned:
            return "an nn.MultiheadAttention beside it has its rows behind the tokens"
        return f"its input's rows aren't the batch's ({self.rows_lost})" if self.rows_lost is not None else self._called_as_is()

    def _called_as_is(self) -> str | None:
        """Why the base layer must be called itself, since that does more than the plain product; None where it doesn't."""
        base = self.base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if hooked or "forward" in base.__dict__:
            return "it carries hooks, which must be called"
        trained = any(p.requires_grad for p in base._parameters.values() if p is not None)
        return "its base weight is trained as well" if trained else None

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output and the changes of the adapters that each row is routed to."""
        call = self.call
        if call is not None:
            base = call.base_of(self.stored)
            if call.suits(x, base):
                return call.run(x, base, self._parameters["bias"])
            self._unsuited(x)
        return self._eager(x)

    def _say_unsuited(self, x: Tensor) -> None:
        weight, name = self.stored()[0].dtype, self.path.rpartition(".")[2]
        other = f"inputs in {x.dtype} over a weight in {weight} (autocast?)" if x.dtype != weight else "rows or tokens of its own"
        warn_once(f"compile: layers {name!r} are left out of their compiled blocks, slower: they get {other}")

    _unsuited: Any = torch.compiler.disable(_say_unsuited)

    def _adapted(self, x: Tensor) -> Tensor:
        vars(self)["reached"], vars(self)["read"] = True, id(x)
        if self.called is not None:
            self.called.set(True)
        routing = self.router.route_in_force(self.path)
        if routing is None or x.numel() == 0:
            return self.base(x)
        if routing.tensors_only and not routing.rows_follow:
            raise RoutingError(
                f"layer {self.path!r} takes its plain path, which a captured pass can't follow from batch to batch"
            )
        if self.rows_lost is not None and routing.per != "all":
            if not any(name in place.slots for place in (self, *self.slices.values()) for name in routing.names):
                return self.base(x)  # of adapters that aren't in this layer
            raise RoutingError(
                f"layer {self.path!r} can't tell the rows apart: {self.rows_lost}. Route all rows alike (bank.use(name), "
                "or bank.route(name)), or leave this layer out of targets."
            )
        if self.kind.storage == EMBEDDING and routing.per == "row":
            if not any(name in self.slots for name in routing.names):
                return self.base(x)
            x = ids_of_rows(self.path, x, routing.rows)
        units = self.units(routing, x)
        used = [(rows, slot) for rows in routing.plans[units] if (slot := self.slots.get(rows.slot)) is not None]
        y = self._low_rank(x, [each for each in used if each[1].rank], units, routing)
        y = self._with_extras(x, y, used, units) if any_extras(used) else y
        return add_slice_biases(y, self.slices.values(), routing.plans[units], units) if self.slices else y

    def _low_rank(self, x: Tensor, used: Sequence[tuple[SlotRows, LayerSlot]], units: int, routing: Routing) -> Tensor:
        """The base's output with what A and B of these slots change, and those of slices."""
        segments = [self._segment(rows, slot, routing, self._path_seed) for rows, slot in used]
        parts = self._slice_segments(routing, units) if self.slices else []
        if not segments and not parts:
            return self.base(x)
        plan = ops.Plan(
            segments=(*segments, *parts),
            units=units,
            route=routing.token,
            route_id=routing.id,
            layer=self.path,
            structure=self.router.structure,
            structure_now=lambda: self.router.structure,
        )
        if not self.kind.linear or any(segment.decomposition is not None for segment in plan.segments):
            return self._mapped(x, self.base(x), routing.per == "token", plan)
        product = self.kind.product if routing.exact else self.kind.fast
        if product is None or self._called_as_is() is not None:
            return ops.add_lora(self.base(x), x, plan)
        return ops.lora_linear(x, self.stored(), self.base._parameters["bias"], product, plan)

    def _with_extras(self, x: Tensor, y: Tensor, used: Sequence[tuple[SlotRows, LayerSlot]], units: int) -> Tensor:
        """y with the slots' biases and rows of the table in it."""
        kernel = bool(self.kind.kernel(self.base))
        alone = kernel and x.ndim < self.base.get_parameter("weight").ndim  # one sample, without a batch
        shape = (units, -1, *(y.shape if alone else y.shape[1:])) if kernel else (units, -1, y.shape[-1])
        y = add_shifts(y, used, self._parameters.get("bias"), shape, kernel)
        if any(ROWS in slot.extras for _, slot in used):
            y = add_rows(y, x, used, self.base, units, looks_up=self.kind.storage == EMBEDDING)
        return y

    # routing is Python's work: under torch.compile each layer is a graph break, and right
    _eager: Any = torch.compiler.disable(_adapted)

    def _mapped(self, x: Tensor, y: Tensor, by_token: bool, plan: ops.Plan) -> Tensor:
        """y and the adapters' changes of it, where the layer isn't linear over features."""
        bias, layer_map = self._parameters.get("bias"), self.low_rank_map
        if by_token or y.ndim == 1:
            tokens = x.reshape(-1, x.shape[-1]) if self.kind.linear else x.reshape(-1)
            return add_mapped(y.reshape(-1, y.shape[-1]), tokens, layer_map, plan, bias).view(y.shape)
        if x.ndim < self.base.get_parameter("weight").ndim and self.kind.kernel(self.base):  # one sample, without a batch
            return add_mapped(y[None], x[None], layer_map, plan, bias)[0]
        return add_mapped(y, x, layer_map, plan, bias)

    def units(self, routing: Routing, x: Tensor) -> int:
        """How many units x has under the routing. Raises RoutingError where it can't be split into them."""
        if self.folded is not None and routing.per == "row" and (rows := self.folded.rows) is not None:
            return routing.units_folded(rows, x, self.path)
        alike = self.kind.linear and x.ndim > 2 and x.shape[0] == x.shape[1]
        if self.beside_turned and routing.per == "row" and alike:
            raise RoutingError(
                f"layer {self.path!r} got {tuple(x.shape)}, and an nn.MultiheadAttention beside it has its rows behind tokens, "
                "so which of two equal dimensions has the rows can't be told. Give another number of tokens, or build the "
                "attention with batch_first=True."
            )
        if not self.kind.kernel(self.base):
            return routing.units_of(x, self.path, features=self.kind.linear)
        if routing.per == "token":
            raise RoutingError(
                f"layer {self.path!r} is a convolution, which mixes neighbouring tokens, so they can't be routed one by one. "
                "Give one route a row, or leave the layer out of targets."
            )
        if x.ndim == self.base.get_parameter("weight").ndim - 1 and routing.per != "all":
            raise RoutingError(
                f"layer {self.path!r} got {tuple(x.shape)}, one sample without a batch dimension, and the route has one entry a "
                "row. Give it a batch of one row."
            )
        return routing.units_of(x, self.path)

    def _slice_segments(self, routing: Routing, units: int) -> list[Segment]:
        return [
            self._segment(rows, slot, routing, carrier.path_seed, carrier.changed)
            for carrier in self.slices.values()
            for rows in routing.plans[units]
            if (slot := carrier.slots.get(rows.slot)) is not None
        ]

    def _segment(
        self, rows: SlotRows, slot: LayerSlot, routing: Routing, path_seed: int, outputs: Outputs | None = None
    ) -> Segment:
        """`outputs`: those that the slot changes, of a slice."""
        draw = None
        if routing.dropout is not None and slot.dropout > 0 and rows.examples_U is not None:
            draw = DropoutDraw(
                probability=slot.dropout,
                seed=slot.seed ^ path_seed,
                step=routing.dropout.steps.get(rows.slot, 0),
                examples_U=rows.examples_U,
                places_UT=rows.places_UT,
            )
        A_RI, B_RO = slot.tensors.A_RI, slot.tensors.B_RO
        if slot.frozen is not None:
            A_RI, B_RO = slot.frozen.joined(A_RI, B_RO)
        return Segment(
            rows=rows.rows,
            A_RI=A_RI,
            B_RO=B_RO,
            scaling=slot.scaling,
            weights_U=rows.weights_U,
            dropout=draw,
            decomposition=self._decomposition(slot, outputs),
            outputs=outputs,
        )

    def _decomposition(self, slot: LayerSlot, outputs: Outputs | None) -> Decomposition | None:
        magnitude = slot.tensors.magnitude_O
        return None if magnitude is None else Decomposition(magnitude_O=magnitude, norm_O=self.norms(slot, outputs))

    def norms(self, slot: LayerSlot, outputs: Outputs | None = None) -> Tensor:
        """‖W + scaling · B A‖ of each output, or of a slice's."""
        weight_OI, tensors = self.kind.weight_oi(self._parameters, torch.float32), slot.tensors
        mine = weight_OI if outputs is None else outputs.rows_of(weight_OI)
        return output_norms(mine, tensors.A_RI, tensors.B_RO, slot.scaling)
