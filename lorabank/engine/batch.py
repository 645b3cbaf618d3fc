"""`Batch`: rows of any number of adapters, padded to one length. N rows × L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.bank.routing import BASE, RowRoute
from lorabank.errors import DataError


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for a GPU's queue."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass sees."""

    input_ids_NL: Tensor
    """int64 token ids, padded on the right."""
    attention_mask_NL: Tensor
    """1 for a real token. Made from lengths, never from a token id: a pad token may also be the end token."""
    weights_NL: Tensor
    """fp32 weight of each token as a target, predicted from the tokens before it; 0: not trained. Column 0 is never a target."""
    routes: tuple[RowRoute, ...]
    """One a row."""
    examples_N: Tensor
    """int64 identity of each row within its adapter's optimizer step: what its dropout is drawn from."""
    lengths: tuple[int, ...]
    """Real tokens of each row."""
    references: tuple[int | None, ...] | None = None
    """For each row, the row of the same tokens on BASE whose log-probabilities are its reference; None without."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.routes)

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
            examples_N=self.examples_N[index.to(self.examples_N.device)],
            lengths=lengths,
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
        examples_N=torch.as_tensor(numbers),
        lengths=lengths,
    )
