"""`Batch`: rows of any number of adapters, padded to one length. N rows × L tokens, E examples.

A row is one example, or packed: several examples of one adapter, end to end, none of which sees another (see packing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.bank.routing import BASE, RowRoute
from lorabank.errors import DataError
from lorabank.kernels.tables import send as send


@dataclass(frozen=True)
class PackedTensors:
    """Where the examples of a batch are, for its model. S spans: examples, and the padding behind them."""

    cu_S: Tensor
    """int32 (S + 1,): cumulative lengths over the rows laid end to end."""
    positions_NL: Tensor
    """int64: each token's place in its example; 0 in padding, which may be longer than a model's table of positions."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass sees."""

    input_ids_NL: Tensor
    """int64 token ids, padded on the right."""
    attention_mask_NL: Tensor
    """1 for a real token. Made from lengths, never from a token id: a pad token may also be the end token."""
    weights_NL: Tensor
    """fp32 weight of each token as a target, predicted from the tokens before it; 0: not trained. The first token of an example
    is never a target."""
    routes: tuple[RowRoute, ...]
    """One a row."""
    examples_E: Tensor
    """int64 identity of each example within its adapter's optimizer step: what its dropout is drawn from."""
    lengths: tuple[int, ...]
    """Real tokens of each row."""
    segments: tuple[tuple[int, ...], ...] | None = None
    """Tokens of each example of each row, in their order; None where every row is one example."""
    references: tuple[int | None, ...] | None = None
    """For each row, the row of the same tokens on BASE whose log-probabilities are its reference; None without."""
    boundaries: PackedTensors | None = None
    """What stands in `segments`, on the device; None: it is made of them when it is asked for."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.routes)

    @property
    def cost(self) -> int:
        """Work of a pass: padded tokens."""
        return self.input_ids_NL.numel()

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one example, so that the model must be told where they begin."""
        return self.segments is not None

    @property
    def spans(self) -> Sequence[tuple[int, int, int]]:
        """Row, first column and column after the last of each example, in order."""
        segments = [(length,) for length in self.lengths] if self.segments is None else self.segments
        return [(row, end - n, end) for row, own in enumerate(segments) for n, end in zip(own, accumulate(own), strict=True)]

    @property
    def example_routes(self) -> tuple[RowRoute, ...]:
        """One an example: its row's."""
        return self.routes if self.segments is None else tuple(self.routes[row] for row, _, _ in self.spans)

    def examples_of(self, rows: Sequence[int]) -> list[int]:
        """Numbers, in this batch, of the examples that `select(rows)` has, in its order."""
        found: dict[int, list[int]] = {}
        for number, (row, _, _) in enumerate(self.spans):
            found.setdefault(row, []).append(number)
        return [number for row in rows for number in found[row]]

    def example_weights(self) -> list[float]:
        """Σ of each example's token weights. For a batch still on the host."""
        if self.segments is None:
            return self.weights_NL.sum(1).tolist()
        return [float(self.weights_NL[row, start:stop].sum()) for row, start, stop in self.spans]

    def example_numbers_NL(self) -> Tensor:
        """int64 on the host: the example, 0 to E - 1, that each token belongs to; padding belongs to its row's last."""
        numbers_NL = torch.zeros(self.rows, self.input_ids_NL.shape[1], dtype=torch.int64)
        for number, (row, start, _) in enumerate(self.spans):
            numbers_NL[row, start:] = number
        return numbers_NL

    @property
    def mask(self) -> Tensor | None:
        """The attention mask, or None where every token is a real one: models then take their fast paths without looking."""
        return None if min(self.lengths) == self.input_ids_NL.shape[1] else self.attention_mask_NL

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids_NL=send(self.input_ids_NL, device),
            attention_mask_NL=send(self.attention_mask_NL, device),
            weights_NL=send(self.weights_NL, device),
            boundaries=None,
        )

    def lengthened(self, multiple: int, longest: int | None) -> Batch:
        """The same batch, padded to a length that `multiple` divides, or to `longest`: shapes that come again are few then."""
        length = self.input_ids_NL.shape[1]
        wanted = -(-length // multiple) * multiple
        more = (wanted if longest is None else min(wanted, longest)) - length
        if more <= 0:
            return self
        return replace(
            self,
            input_ids_NL=F.pad(self.input_ids_NL, (0, more)),
            attention_mask_NL=F.pad(self.attention_mask_NL, (0, more)),
            weights_NL=F.pad(self.weights_NL, (0, more)),
            boundaries=None,
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, cut to the longest of them. Parts of a batch give, added up, the gradients of the whole.

        A row's reference must be among `rows` too, else DataError.
        """
        if not rows:
            raise DataError("Batch.select: no rows")
        index = torch.tensor(list(rows), device=self.input_ids_NL.device)
        lengths = tuple(self.lengths[i] for i in rows)
        longest = max(lengths)
        return replace(
            self,
            input_ids_NL=self.input_ids_NL[index, :longest],
            attention_mask_NL=self.attention_mask_NL[index, :longest],
            weights_NL=self.weights_NL[index, :longest],
            routes=tuple(self.routes[i] for i in rows),
            examples_E=self.examples_E[self.examples_of(rows)],
            lengths=lengths,
            segments=None if self.segments is None else tuple(self.segments[i] for i in rows),
            boundaries=None,
            references=None if self.references is None else _moved_references(self.references, rows),
        )


def _moved_references(references: Sequence[int | None], rows: Sequence[int]) -> tuple[int | None, ...]:
    places = {old: new for new, old in reversed(list(enumerate(rows)))}
    moved: list[int | None] = []
    for row in rows:
        reference = references[row]
        if reference is not None and reference not in places:
            raise DataError(
                f"Batch.select: row {row} has row {reference} as its reference, which isn't selected. Keep the two together."
            )
        moved.append(None if reference is None else places[reference])
    return tuple(moved)


def with_base_references(batch: Batch) -> Batch:
    """The batch and, behind it, each row once more on BASE as its reference: one pass gives both."""
    if batch.references is not None:
        raise DataError("with_base_references: the batch has references already")
    n = batch.rows
    double = batch.select([*range(n), *range(n)])
    return replace(double, routes=(*batch.routes, *[BASE] * n), references=(*range(n, 2 * n), *[None] * n))


def make_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[float]]],
    routes: Sequence[RowRoute] | RowRoute = BASE,
    *,
    examples: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Batch:
    """Pad (token ids, weights) rows on the right. `routes`: one for all, or one a row.

    `examples`: each row's identity within its adapter's optimizer step, from which dropout is drawn; without it the row's place.
    Raises DataError for rows that are empty or whose weights don't fit or aren't finite.
    """
    if not rows:
        raise DataError("make_batch: no rows")
    each = tuple(routes) if isinstance(routes, Sequence) and not isinstance(routes, str) else (routes,) * len(rows)
    numbers = list(range(len(rows)) if examples is None else examples)
    if len(each) != len(rows) or len(numbers) != len(rows):
        raise DataError(f"make_batch: {len(rows)} rows but {len(each)} routes and {len(numbers)} example numbers")
    lengths = tuple(len(ids) for ids, _ in rows)
    longest = max(lengths)
    ids_NL = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask_NL = torch.zeros(len(rows), longest, dtype=torch.int64)
    weights_NL = torch.zeros(len(rows), longest)
    for i, (ids, weights) in enumerate(rows):
        if not ids or len(ids) != len(weights):
            raise DataError(
                f"make_batch: row {i} has {len(ids)} tokens and {len(weights)} weights; expected at least one, and as many"
            )
        ids_NL[i, : len(ids)] = torch.as_tensor(ids)
        mask_NL[i, : len(ids)] = 1
        weights_NL[i, : len(ids)] = torch.as_tensor(weights, dtype=torch.float32)
    weights_NL[:, 0] = 0.0
    if not bool(weights_NL.isfinite().all()):
        bad = int((~weights_NL.isfinite()).any(1).nonzero()[0])
        raise DataError(f"make_batch: row {bad} has a token weight that is NaN or infinite")
    return Batch(
        input_ids_NL=ids_NL,
        attention_mask_NL=mask_NL,
        weights_NL=weights_NL,
        routes=each,
        examples_E=torch.as_tensor(numbers),
        lengths=lengths,
    )


Example = tuple[Sequence[int], Sequence[float]]
"""Token ids and their weights."""


def pack_batch(
    rows: Sequence[Sequence[Example]],
    routes: Sequence[RowRoute] | RowRoute = BASE,
    *,
    examples: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Batch:
    """Like `make_batch`, for rows of several examples each, none of which sees another. `routes`: one for all, or one a row.

    `examples`: the identity of each example, row after row. Rows of one example each give a plain batch. Raises DataError.
    """
    flat = list(_checked(rows))
    numbers = list(range(len(flat)) if examples is None else examples)
    if len(numbers) != len(flat):
        raise DataError(f"pack_batch: {len(flat)} examples but {len(numbers)} example numbers")
    if all(len(row) == 1 for row in rows):
        return make_batch(flat, routes, examples=numbers, pad_id=pad_id)
    joined = [
        ([token for ids, _ in row for token in ids], [w for _, weights in row for w in (0.0, *weights[1:])])  # no first token
        for row in rows
    ]
    batch = make_batch(joined, routes, pad_id=pad_id)
    return replace(batch, examples_E=torch.as_tensor(numbers), segments=tuple(tuple(len(ids) for ids, _ in row) for row in rows))


def _checked(rows: Sequence[Sequence[Example]]) -> Iterator[Example]:
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"pack_batch: row {number} has no examples")
        for place, (ids, weights) in enumerate(row):
            if not ids or len(ids) != len(weights):
                raise DataError(
                    f"pack_batch: example {place} of row {number} has {len(ids)} tokens and {len(weights)} weights; expected at "
                    "least one, and as many"
                )
            yield ids, weights
