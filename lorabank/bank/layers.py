"""`LoRALayer`: a base layer where it stands in the model, with the adapters' changes of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.bank.carrier import LayerSlot
from lorabank.bank.extra.extras import ROWS, add_rows, add_shifts, any_extras
from lorabank.bank.fused import LayerCall, LayerTables, TokenTables
from lorabank.bank.kinds import EMBEDDING
from lorabank.bank.layer_slots import SlottedLayer
from lorabank.bank.places import ids_of_rows
from lorabank.bank.routing import Routing, SlotRows
from lorabank.bank.slices import add_slice_biases
from lorabank.errors import RoutingError
from lorabank.kernels import ops
from lorabank.kernels.convolved import lora_conv, suits
from lorabank.kernels.mapped import add_mapped
from lorabank.kernels.segments import Decomposition, DropoutDraw, Outputs, Segment
from lorabank.notices import warn_once


class LoRALayer(SlottedLayer):
    """A base layer with the bank's slots beside it."""

    def call_for(self, A: Tensor, B: Tensor, tables: LayerTables, tokens: tuple[TokenTables, ...], rows_U: Tensor) -> LayerCall:
        """This layer's part in a call of a compiled block."""
        return LayerCall(A, B, tables, tokens, rows_U, self.kind.storage)

    @property
    def fusable(self) -> bool:
        """Whether a compiled block may compute this layer's product itself."""
        return bool(self.slots) and self.alone is None

    @property
    def windowed(self) -> bool:
        """Whether its rows are parts of the batch's (windows, tokens apart), of which a compiled block has no tables."""
        return self.folded is not None and not self.folded.by_token

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
        if self.windowed:
            return "a module above splits its rows"
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
        if self.kind.kernel(self.base) and suits(x, self.base, self.low_rank_map, plan) and self._called_as_is() is None:
            return lora_conv(x, self.base, self.low_rank_map, plan)
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
        if self.folded is not None and routing.per == "row":
            rows = self.folded.rows if self.call is None else self.call.rows
            if rows is not None:
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
