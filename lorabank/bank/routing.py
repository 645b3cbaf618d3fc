"""`Routing`: which rows, or packed tokens, of a batch use which adapters. Built once, shared by every layer.

The routing in force is looked up in this order: the innermost `with bank.route(...)` of the calling context, then the
sticky `bank.use(...)`, then the bank's only adapter. Backward and recomputation use the one that the forward saw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor

from lorabank.errors import AdapterNameError, RoutingError, closest
from lorabank.kernels.segments import Rows
from lorabank.kernels.tables import DropTables, RouteTables, drop_tables, route_tables, send, slots_of_tokens


class _Base:
    """The type of `BASE`."""

    def __repr__(self) -> str:
        return "BASE"

    def __reduce__(self) -> str:
        return "BASE"


BASE: Final = _Base()
"""Routes a row to the frozen base alone."""

RowRoute = str | _Base | Mapping[str, float]
"""One row's route: an adapter's name, `BASE`, or a weighted mixture {"formal": 0.7, "terse": 0.3}."""
Repeat = tuple[Literal["interleave", "tile"], int]
"""How a library multiplies rows: beams interleave (row i of the batch is row i // k), guidance tiles (row i mod n)."""

Size = tuple[int, int, int, torch.device]
"""What tables are made for: (units, tokens of each, slots, device)."""

SIZES = 32
"""Sizes that a route keeps tables for, at most."""

_ROUTE_IDS = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class DropoutState:
    """Which dropout masks a training pass draws. Without it no slot drops anything."""

    steps: Mapping[str, int]
    """Adapter name to its optimizer step."""
    examples: Tensor
    """int64, one a row: the row's identity within its adapter's step. Where rows are packed (rows, tokens): one a token."""
    places: Tensor | None = None
    """int64 (rows, tokens), where rows are packed: each token's place in its example."""


@dataclass(frozen=True, kw_only=True)
class SlotRows:
    """The units of one batch that use one slot."""

    slot: str
    rows: Rows
    weights_U: Tensor | None = None
    examples_U: Tensor | None = None
    places_UT: Tensor | None = None
    units: tuple[int, ...] = (0,)
    """`rows` as numbers on the host."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """A batch's routing. `units` is the size of a layer input's first dimension (or all tokens, for `per="token"`)."""

    per: Literal["all", "row", "token"]
    plans: Mapping[int, tuple[SlotRows, ...]]
    """Number of units to the slots' rows. More than one entry when rows may arrive multiplied or not."""
    names: frozenset[str]
    """Adapters that take part."""
    dropout: DropoutState | None = None
    exact: bool = True
    """Whether a base row in a mixed batch must be the base's to the last bit; else base products may round otherwise, faster."""
    rows: int | None = None
    """Of the batch that the model is given; None where that isn't known: all alike, by token, or multiplied by a library."""
    set_in_backward: bool = False
    """Put in force during a backward pass: by `checkpoint_context` for a recomputation, or on purpose."""
    id: int = field(default_factory=lambda: next(_ROUTE_IDS))
    token: Tensor = field(init=False)
    """`id` as a tensor, saved with the activations."""
    tensors_only: bool = False
    """The pass is being captured as a graph, so a layer that reads more of this route than its tables must refuse."""
    rows_follow: bool = False
    """In such a pass: the slots' rows are the graph's inputs too, so a layer may read these."""
    nested: dict[tuple[frozenset[str], bool], Routing] | None = field(default=None, repr=False)
    """By their names and `exact`: routes for all rows that were put in force inside of this one, whose tables a capture needs."""
    _tables: dict[Size, RouteTables | None] = field(init=False, default_factory=dict, repr=False)
    _drops: dict[Size, DropTables | None] = field(init=False, default_factory=dict, repr=False)
    _rows: dict[torch.device, list[Tensor]] = field(init=False, default_factory=dict, repr=False)
    _slots: dict[Size, Tensor] = field(init=False, default_factory=dict, repr=False)
    _numbered: list[tuple[int, ...]] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", torch.tensor(self.id))

    def tables(self, units: int, tokens: int, numbers: Mapping[str, int], slots: int, device: torch.device) -> RouteTables | None:
        """The route for `units` × `tokens` tokens as tensors on `device`; None where a row has several slots, or weights.

        `numbers`: adapter to its slot number, below `slots`.
        """
        key = (units, tokens, slots, device)
        if not self.tensors_only:
            self._forget(numbers)
        if key not in self._tables:
            if self.tensors_only:
                raise RoutingError(f"a captured pass has no tables of {units} × {tokens} tokens: passes before it had none such")
            rows: dict[int, Sequence[int]] = {}
            for part in self.plans[units]:
                rows[numbers[part.slot]] = part.units
            used = [unit for mine in rows.values() for unit in mine]
            plain = len(used) == len(set(used)) and all(part.weights_U is None for part in self.plans[units])
            self._tables[key] = route_tables(rows, units, tokens, slots).to(device) if plain else None
        return self._tables[key]

    def drops(self, units: int, tokens: int, numbers: Mapping[str, int], slots: int, device: torch.device) -> DropTables | None:
        """What dropout is drawn from, beside `tables` of the same arguments; None in a pass that drops nothing."""
        tables, key = self.tables(units, tokens, numbers, slots, device), (units, tokens, slots, device)
        if self.dropout is None or tables is None:
            return None
        if key not in self._drops:
            steps = [0] * slots
            for name in self.names:
                steps[numbers[name]] = self.dropout.steps.get(name, 0)
            self._drops[key] = drop_tables(tables.order_N, tokens, steps, self.dropout.examples, self.dropout.places)
        return self._drops[key]

    def captured(
        self, units: int, tokens: int, slots: int, device: torch.device, tables: RouteTables, drops: DropTables | None
    ) -> Routing:
        """The same route, read off `tables` and `drops` alone."""
        made, key = replace(self, tensors_only=True), (units, tokens, slots, device)
        made._tables[key], made._drops[key] = tables, drops
        return made

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Those that tables were asked for, of a route that is all in its tables."""
        return tuple(key for key, tables in self._tables.items() if tables is not None)

    def slot_rows(self, device: torch.device) -> list[Tensor]:
        """int64 rows of each adapter, in the order of their names, on `device`. None where all rows are routed alike."""
        if self.per == "all":
            return []
        if device not in self._rows:
            parts = (part for units in sorted(self.plans) for part in sorted(self.plans[units], key=lambda part: part.slot))
            self._rows[device] = [send(torch.tensor(part.units), device) for part in parts]
        return self._rows[device]

    def _forget(self, numbers: Mapping[str, int]) -> None:
        """Drop what was made for other slot numbers of these names, and the oldest where a lasting route has met many sizes."""
        now = tuple(numbers.get(name, -1) for name in sorted(self.names))
        if self._numbered != [now]:
            self._numbered[:] = [now]
            for made in (self._tables, self._drops, self._slots):
                made.clear()
        while len(self._tables) > SIZES:
            oldest = next(iter(self._tables))
            for made in (self._tables, self._drops, self._slots):
                made.pop(oldest, None)

    def slots_of_tokens(self, size: Size, tables: RouteTables) -> Tensor:
        """int64 slot number of each token, −1 for none, read off the `tables` of that size."""
        if size not in self._slots:
            self._slots[size] = slots_of_tokens(tables)
        return self._slots[size]

    def following(self, tables: Mapping[Size, RouteTables], rows: Sequence[Tensor] | None) -> Routing:
        """The same route without dropout, read off `tables` and `rows` (as `slot_rows` gives them; None: by no layer) alone."""
        plans, given = self.plans, iter(rows or ())
        if rows:
            plans = {
                units: tuple(replace(p, rows=next(given)) for p in sorted(plans[units], key=lambda part: part.slot))
                for units in sorted(plans)
            }
        made = replace(self, plans=plans, tensors_only=True, rows_follow=rows is not None)
        made._tables.update(tables)
        return made

    def inside(self, inner: Routing) -> Routing:
        """What is in force where `inner` is put in force inside of this one: the same, with tables that last as long as a graph.

        Raises RoutingError in a pass that is being captured, for a route that its graph couldn't follow.
        """
        if self.nested is None or inner.tensors_only or inner.set_in_backward:
            return inner
        same_for_all = inner.per == "all" and inner.dropout is None
        if not same_for_all or any(part.weights_U is not None for part in inner.plans[1]):
            if self.tensors_only:
                raise RoutingError(
                    "a captured pass can't follow a route with rows of its own, or a mixture, that is put in force inside of the "
                    "pass's. BASE or one adapter's name can be; name rows in the pass's own route"
                )
            return inner
        kept = self.nested.setdefault((inner.names, inner.exact), inner)
        tables = {size: made for size, made in kept._tables.items() if made is not None}
        return kept.following(tables, ()) if self.tensors_only else kept

    def units_of(self, x: Tensor, layer: str, *, features: bool = True) -> int:
        """How many units the input x of `layer` has under this routing. Raises RoutingError when it doesn't fit.

        `features`: whether x's last dimension is one token's features; ids have none.
        """
        if self.per == "all":
            return 1
        units = x.shape[0] if self.per == "row" else x.numel() // max(1, x.shape[-1] if features else 1)
        if units in self.plans:
            return units
        expected = " or ".join(str(n) for n in sorted(self.plans))
        way_out = (
            "If a library multiplies the rows (beam search, num_return_sequences, guidance), say how: "
            'route(rows, repeat=("interleave", k)) or ("tile", k). A layer that folds rows and tokens into one dimension '
            "needs route(tokens=...)."
            if self.per == "row"
            else "Give one entry a token."
        )
        raise RoutingError(
            f"layer {layer!r}: the route names {expected} {self.per}s, but the layer's input has {units} "
            f"(shape {tuple(x.shape)}). {way_out}"
        )

    def units_folded(self, rows: int, x: Tensor, layer: str) -> int:
        """The same where the module above folded its `rows` with what follows them, row by row: x has a multiple of them."""
        if rows in self.plans and x.shape[0] % rows == 0:
            return rows
        expected = " or ".join(str(n) for n in sorted(self.plans))
        raise RoutingError(
            f"layer {layer!r}: the route names {expected} rows, and the module that folds them ahead of this layer was given "
            f"{rows} (the layer {tuple(x.shape)}). If a library multiplies the rows (beam search, num_return_sequences, "
            'guidance), say how: route(rows, repeat=("interleave", k)) or ("tile", k).'
        )


def all_rows(route: RowRoute, device: torch.device) -> Routing:
    """Every row, however many there are, uses `route`."""
    if isinstance(route, _Base):
        return Routing(per="all", plans={1: ()}, names=frozenset())
    if isinstance(route, str):
        return Routing(per="all", plans={1: (SlotRows(slot=route, rows=slice(0, 1)),)}, names=frozenset([route]))
    rows = tuple(
        SlotRows(slot=name, rows=slice(0, 1), weights_U=None if weight == 1 else torch.tensor([float(weight)], device=device))
        for name, weight in route.items()
        if weight != 0  # a product with zero would still carry a NaN over
    )
    return Routing(per="all", plans={1: rows}, names=frozenset(route))


def per_row(
    rows: Sequence[RowRoute],
    *,
    device: torch.device,
    repeat: Repeat | None = None,
    dropout: DropoutState | None = None,
    per: Literal["row", "token"] = "row",
    exact: bool = True,
) -> Routing:
    """One route a row (or a token). With `repeat` the rows may also arrive multiplied."""
    if not rows:
        raise RoutingError("route: an empty list of rows. Give one adapter name, BASE or mixture for each row of the batch.")
    plans = {len(rows): _slot_rows(rows, device, dropout)}
    if repeat is not None:
        multiplied = _multiply(rows, repeat)
        if dropout is not None:
            raise RoutingError("route: rows that a library multiplies can't draw dropout; leave out repeat= in training.")
        plans[len(multiplied)] = _slot_rows(multiplied, device, None)
    names = frozenset(name for row in rows if not isinstance(row, _Base) for name in ([row] if isinstance(row, str) else row))
    known = len(rows) if per == "row" and repeat is None else None
    return Routing(per=per, plans=plans, names=names, dropout=dropout, exact=exact, rows=known)


def _multiply(rows: Sequence[RowRoute], repeat: Repeat) -> list[RowRoute]:
    if not isinstance(repeat, tuple | list) or len(repeat) != 2:
        raise RoutingError(f'route: repeat={repeat!r}; expected ("interleave" | "tile", copies), such as ("interleave", 4)')
    how, times = repeat
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise RoutingError(f"route: repeat=({how!r}, {times!r}) needs a whole number of copies ≥ 1")
    if how == "interleave":
        return [row for row in rows for _ in range(times)]
    if how == "tile":
        return [row for _ in range(times) for row in rows]
    raise RoutingError(
        f"route: repeat={how!r} is unknown; use 'interleave' (beams) or 'tile' (guidance)"
        f"{closest(str(how), ['interleave', 'tile'])}"
    )


def _slot_rows(rows: Sequence[RowRoute], device: torch.device, dropout: DropoutState | None) -> tuple[SlotRows, ...]:
    indices: dict[str, list[int]] = {}
    weights: dict[str, list[float]] = {}
    for i, row in enumerate(rows):
        if isinstance(row, _Base):
            continue
        for name, weight in ({row: 1.0} if isinstance(row, str) else row).items():
            if weight == 0:  # a product with zero would still carry a NaN over
                continue
            indices.setdefault(name, []).append(i)
            weights.setdefault(name, []).append(float(weight))
    slots = []
    places = None if dropout is None else dropout.places
    for name, where in indices.items():
        contiguous = where[-1] - where[0] + 1 == len(where)
        slots.append(
            SlotRows(
                slot=name,
                rows=slice(where[0], where[-1] + 1) if contiguous else send(torch.tensor(where), device),
                weights_U=None if all(w == 1 for w in weights[name]) else torch.tensor(weights[name], device=device),
                examples_U=None if dropout is None else send(dropout.examples[torch.tensor(where)], device),
                places_UT=None if places is None else send(places[torch.tensor(where)], device),
                units=tuple(where),
            )
        )
    return tuple(slots)


def build_routing(
    rows: RowRoute | Sequence[RowRoute] | None,
    *,
    known: Sequence[str],
    device: torch.device,
    tokens: Sequence[RowRoute] | None = None,
    repeat: Repeat | None = None,
    dropout: DropoutState | None = None,
    exact: bool = True,
) -> Routing:
    """The Routing for `rows` (one route for all, or a list with one a row) or `tokens` (a list with one a packed token).

    Raises AdapterNameError for a name that isn't in `known`, RoutingError for anything else that is no route.
    """
    if (rows is None) == (tokens is None):
        raise RoutingError("route: give either rows (one entry a row, or one name for all) or tokens (one entry a packed token)")
    each = tokens if tokens is not None else rows
    if isinstance(each, Sequence) and not isinstance(each, str):
        names = dict.fromkeys(row for row in each if isinstance(row, str))
        for row in [*names, *(row for row in each if not isinstance(row, str))]:
            check_route(row, known)
        if dropout is not None and len(dropout.examples) != len(each):
            raise RoutingError(f"route: dropout names {len(dropout.examples)} examples for {len(each)} rows; give one a row")
        return per_row(each, device=device, repeat=repeat, dropout=dropout, per="row" if tokens is None else "token", exact=exact)
    if each is None or dropout is not None or repeat is not None:
        raise RoutingError("route: dropout and repeat need a list with one entry a row")
    check_route(each, known)
    return all_rows(each, device)


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_route(route: RowRoute, known: Sequence[str]) -> None:
    """Raise unless `route` names only adapters in `known`, or is BASE."""
    if isinstance(route, _Base):
        return
    if isinstance(route, str):
        names: Sequence[str] = [route]
    elif isinstance(route, Mapping):
        names = list(route)
        bad = [weight for weight in route.values() if not _is_weight(weight)]
        if not names or bad:
            raise RoutingError(
                f"route: a mixture is {{adapter name: finite weight}}, such as {{'formal': 0.7, 'terse': 0.3}}; got {route!r}"
            )
    else:
        raise RoutingError(f"route: expected an adapter's name, BASE or {{name: weight}}, got {route!r}")
    for name in names:
        if name not in known:
            have = ", ".join(known) or "none"
            raise AdapterNameError(f"no adapter {name!r} in the bank; it has: {have}{closest(name, known)}")
