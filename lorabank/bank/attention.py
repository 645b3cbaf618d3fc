"""`LoRAMultihead`: an `nn.MultiheadAttention` with the bank's slots beside its projections.

Where no row is routed to an adapter in it, it is torch's own call. Else q, k and v are projected with the slots' changes,
attended as torch does (kernels/attend.py), and projected back. Rows of the base alone are torch's own in a mixed batch where the
route asks for that. Shapes: B rows × T queries or S keys × E features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import LayerSlot, Router, SlotParameters
from lorabank.bank.layers import LoRALayer
from lorabank.bank.multihead import APART, IN, OUT, Projection, projections_of
from lorabank.bank.routing import Routing, SlotRows
from lorabank.bank.slices import SliceCarrier
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import Adapted
from lorabank.errors import LorabankError, RoutingError
from lorabank.formats.output_slice import OutputSlice
from lorabank.kernels.attend import Attention
from lorabank.kernels.segments import Outputs, Segment


class ProjectionLayer(LoRALayer):
    """One projection with its slots. The attention module calls it; it stands nowhere in the model."""

    def __init__(self, base: Projection, path: str, router: Router, rows_lost: str | None) -> None:
        super().__init__(base, path, router, rows_lost)
        vars(self).update(projection=base, shown=None, stored_as=None, parts={})

    projection: Projection
    """Its base."""
    shown: Callable[[], None] | None
    """Called when the leaves are others."""
    stored_as: Callable[[str, RankStore], None] | None
    """Called with a slice's name and store."""
    parts: dict[tuple[int, int], _Rows]

    @property
    def alone(self) -> str | None:
        """Never a part of a compiled block: what is between the projections isn't compiled."""
        return "nn.MultiheadAttention computes with its weights, and is left out whole"

    @property
    def attends(self) -> bool:
        """Whether PEFT's files name it by the attention module."""
        return self.projection.fused

    def slice(self, name: str, outputs: OutputSlice) -> SliceCarrier:
        """q, k or v alone, made when it is first asked for."""
        known, carrier = name in self.slices, super().slice(name, outputs)
        if not known and self.stored_as is not None:
            self.stored_as(name, carrier.store)
        return carrier

    def rows_of(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs `start` to `stop` alone, of an input that isn't the others'."""
        part = self.parts.get((start, stop))
        if part is None:
            part = self.parts[start, stop] = _Rows(self, slice(start, stop))
        part.projection.refresh()
        vars(part).update(rows_lost=self.rows_lost, folded=self.folded)
        return part(x)

    def _refresh(self) -> None:
        if self.shown is not None:
            self.shown()


class _Rows(LoRALayer):
    """Some outputs of a projection, whose slots it has: all of A, and their rows of B."""

    def __init__(self, whole: ProjectionLayer, rows: slice) -> None:
        projection = Projection(whole.projection.attention, whole.projection.name, rows)
        super().__init__(projection, whole.path, whole.router, whole.rows_lost)
        vars(self).update(projection=projection, slots=whole.slots, slices=whole.slices, rows=rows)

    projection: Projection
    rows: slice

    def _segment(
        self, rows: SlotRows, slot: LayerSlot, routing: Routing, path_seed: int, outputs: Outputs | None = None
    ) -> Segment:
        segment = super()._segment(rows, slot, routing, path_seed, outputs)
        return replace(segment, B_RO=segment.B_RO[:, self.rows].contiguous())

    def _slice_segments(self, routing: Routing, units: int) -> list[Segment]:
        """Those parts of slices that are among these outputs."""
        found: list[Segment] = []
        for carrier in self.slices.values():
            first, last = carrier.outputs.start, carrier.outputs.start + carrier.outputs.width
            start, stop = max(first, self.rows.start), min(last, self.rows.stop)
            for rows in routing.plans[units] if start < stop else ():
                if (slot := carrier.slots.get(rows.slot)) is not None:
                    whole = super()._segment(rows, slot, routing, carrier.path_seed)
                    outputs = Outputs(start - self.rows.start, stop - start, self.rows.stop - self.rows.start)
                    B_RO = whole.B_RO[:, start - first : stop - first].contiguous()
                    found.append(replace(whole, B_RO=B_RO, outputs=outputs))
        return found


def _show_slice(shows: SlotParameters, projection: str, name: str, store: RankStore) -> None:
    shows.show(f"{projection}_{name}_", store)


class LoRAMultihead(Adapted):
    """An `nn.MultiheadAttention` with the bank's slots beside its projections."""

    def __init__(self, base: nn.Module, path: str, router: Router, rows_lost: str | None) -> None:
        """`rows_lost`: why the route can't follow this module's input to the batch's rows, None when it can."""
        projections = projections_of(base)
        carriers = {name: ProjectionLayer(each, f"{path}.{name}", router, rows_lost) for name, each in projections.items()}
        super().__init__(base, path, {f"{name}_": carrier.store for name, carrier in carriers.items()})
        self.__dict__.update(carriers=carriers, router=router)
        shows = self._slot_parameters  # and nothing else of this wrapper, which a cycle would keep alive
        for name, carrier in carriers.items():
            stored_as = functools.partial(_show_slice, shows, name)
            vars(carrier).update(shown=shows.refresh, stored_as=stored_as)

    carriers: dict[str, ProjectionLayer]
    """By name, the output's last."""
    router: Router

    def extra_repr(self) -> str:
        return f"slots={sorted(self._here())}"

    def train(self, mode: bool = True) -> LoRAMultihead:
        """The base module's mode too: it has dropout of its own."""
        super().train(mode)
        self.base.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LoRAMultihead:
        self.base._apply(fn, recurse)
        for carrier in self.carriers.values():
            carrier.projection.refresh()
            for place in (carrier, *carrier.slices.values()):
                place.move(carrier.stored()[0].device)
        return self

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What torch's module gives (output, weights or None), with the changes of the adapters that each row is routed to."""
        return self._eager(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _adapted(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        base: Any = self.base
        base.training = self.training  # which may have been set past train()
        for carrier in self.carriers.values():
            vars(carrier)["reached"] = True
            carrier.projection.refresh()
        routing = self.router.route_in_force(self.path)

        def plain() -> tuple[Tensor, Tensor | None]:
            return base(query, key, value, key_padding_mask, need_weights, attn_mask, average, is_causal)

        if routing is None or query.numel() == 0 or not routing.names & self._here():
            return plain()
        self._check(routing, query, key, value)
        inputs = self._rows_first(query, key, value)
        batched = query.ndim == 3
        attend = Attention(
            heads=base.num_heads,
            dropout=base.dropout if self.training else 0.0,
            bias_k=base.bias_k,
            bias_v=base.bias_v,
            zero_key=base.add_zero_attn,
            key_padding_mask=key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None],
            attn_mask=attn_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            average=average,
        )
        attend.check(len(inputs[0]), inputs[0].shape[1], inputs[1].shape[1])
        first = next(iter(self.carriers.values()))
        for x in inputs[1:]:
            first.units(routing, x)  # raises where they have other rows, before anything is computed
        units = first.units(routing, inputs[0])
        untouched = self._untouched(routing, units, len(inputs[0]))
        theirs = None if untouched is None else plain()  # before ours, so that its dropout is drawn as without adapters
        out, weights = attend(*self._projected(*inputs))
        out = self.carriers[OUT](out)
        if theirs is not None and untouched is not None:
            out, weights = self._beside(out, weights, theirs, untouched.to(out.device))
            return out, weights
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if base.batch_first else out.transpose(0, 1), weights

    # routing is Python's work: under torch.compile each module is a graph break, and right
    _eager: Any = torch.compiler.disable(_adapted)

    def _here(self) -> set[str]:
        places = (place for carrier in self.carriers.values() for place in (carrier, *carrier.slices.values()))
        return {name for place in places for name in place.slots}

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; each distinct input goes through its part of the projection once."""
        if IN not in self.carriers:
            q, k, v = (self.carriers[name](x) for name, x in zip(APART, (query, key, value), strict=True))
            return q, k, v
        whole, size = self.carriers[IN], query.shape[-1]
        if query is key and key is value:
            q, k, v = whole(query).chunk(3, -1)
            return q, k, v
        q = whole.rows_of(query, 0, size)
        if key is value:
            k, v = whole.rows_of(key, size, 3 * size).chunk(2, -1)
            return q, k, v
        return q, whole.rows_of(key, size, 2 * size), whole.rows_of(value, 2 * size, 3 * size)

    def _rows_first(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as (B, T or S, features); what was one tensor is one still."""
        base: Any = self.base
        turned: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in turned:
                turned[id(x)] = x[None] if x.ndim == 2 else x if base.batch_first else x.transpose(0, 1)
        return turned[id(query)], turned[id(key)], turned[id(value)]

    def _untouched(self, routing: Routing, units: int, rows: int) -> Tensor | None:
        """bool (B,), rows that the base alone computes; None where there are none, or where rounding may differ."""
        if not routing.exact or routing.per != "row":
            return None
        here, left = self._here(), torch.ones(units, dtype=torch.bool)
        for part in routing.plans[units]:
            if part.slot in here:
                left[list(part.units)] = False
        return left.repeat_interleave(rows // units) if bool(left.any()) else None

    def _beside(
        self, out: Tensor, weights: Tensor | None, theirs: tuple[Tensor, Tensor | None], untouched_B: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Base rows as torch's own call computed them, which saw the whole batch as without adapters; the others as they are."""
        base: Any = self.base
        plain, plain_weights = theirs
        out = out if base.batch_first else out.transpose(0, 1)
        out = torch.where(untouched_B.view((-1, 1, 1) if base.batch_first else (1, -1, 1)), plain, out)
        if weights is None or plain_weights is None:
            return out, None
        return out, torch.where(untouched_B.view(-1, *(1,) * (weights.ndim - 1)), plain_weights, weights)

    def _check(self, routing: Routing, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise RoutingError or LorabankError for a call that can't be computed here."""
        numbers_read = routing.per == "row" and routing.exact  # by `_untouched`, on the host
        if routing.tensors_only and (numbers_read or not routing.rows_follow):
            raise RoutingError(f"attention {self.path!r} takes its plain path, which a captured pass can't follow")
        if query.is_nested or key.is_nested or value.is_nested:
            raise LorabankError(
                f"attention {self.path!r} got a NestedTensor, whose rows can't carry adapters. Give padded tensors and a "
                "key_padding_mask; an nn.TransformerEncoder makes none once its use_nested_tensor is False."
            )
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise LorabankError(f"attention {self.path!r} got query, key and value {shapes}; expected three 3-D, or three 2-D")
        if query.ndim == 2 and routing.per == "row":
            raise RoutingError(
                f"attention {self.path!r} got {tuple(query.shape)}, one sample without a batch dimension, and the route has one "
                "entry a row. Give it a batch of one row."
            )
        hooks: Sequence[Any] = (self.base._forward_hooks, self.base._forward_pre_hooks)
        if any(hooks) or self.base._backward_hooks or self.base._backward_pre_hooks:
            raise LorabankError(
                f"attention {self.path!r} carries hooks that were there before the bank, and an adapted pass can't call them. "
                "Take them off, register them after attach, or leave the module out of targets."
            )
