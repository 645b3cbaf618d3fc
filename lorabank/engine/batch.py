"""`Batch`: rows of any number of adapters, padded to one length. N rows × L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorabank.bank.routing import BASE, RowRoute
from lorabank.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass sees."""

    input_ids_NL: Tensor
    attention_mask_NL: Tensor
    """1 for a real token. Made from lengths, never from a token id: a pad token may also be the end token."""
    weights_NL: Tensor
    """fp32 weight of each token as a target, predicted from the tokens before it; 0: not trained. Column 0 is never a target."""
    routes: tuple[RowRoute, ...]
    examples_N: Tensor
    """int64 identity of each row within its adapter's optimizer step: what its dropout is drawn from."""
    lengths: tuple[int, ...]
    references: tuple[int | None, ...] | None = None
    """For each row, the row of the same tokens on BASE whose log-probabilities are its reference; None without."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.routes)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("input_ids_NL", "attention_mask_NL", "weights_NL")}
        return replace(self, **moved)

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, cut to the longest of them."""
        index = torch.tensor(list(rows))
        lengths = tuple(self.lengths[i] for i in rows)
        longest = max(lengths)
        return replace(
            self,
            input_ids_NL=self.input_ids_NL[index, :longest],
            attention_mask_NL=self.attention_mask_NL[index, :longest],
            weights_NL=self.weights_NL[index, :longest],
            routes=tuple(self.routes[i] for i in rows),
            examples_N=self.examples_N[index],
            lengths=lengths,
            references=None,
        )


def with_base_references(batch: Batch) -> Batch:
    """The batch and, behind it, each row once more on BASE as its reference: one pass gives both."""
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
    """Pad (token ids, weights) rows on the right. `routes`: one for all, or one a row."""
    if not rows:
        raise DataError("make_batch: no rows")
    each = tuple(routes) if isinstance(routes, Sequence) and not isinstance(routes, str) else (routes,) * len(rows)
    if len(each) != len(rows):
        raise DataError(f"make_batch: {len(rows)} rows but {len(each)} routes")
    lengths = tuple(len(ids) for ids, _ in rows)
    longest = max(lengths)
    ids_NL = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask_NL = torch.zeros(len(rows), longest, dtype=torch.int64)
    weights_NL = torch.zeros(len(rows), longest)
    for i, (ids, weights) in enumerate(rows):
        if len(ids) != len(weights):
            raise DataError(f"make_batch: row {i} has {len(ids)} tokens but {len(weights)} weights")
        ids_NL[i, : len(ids)] = torch.as_tensor(ids)
        mask_NL[i, : len(ids)] = 1
        weights_NL[i, : len(ids)] = torch.as_tensor(weights, dtype=torch.float32)
    weights_NL[:, 0] = 0.0
    numbers = torch.as_tensor(list(range(len(rows))) if examples is None else list(examples))
    return Batch(input_ids_NL=ids_NL, attention_mask_NL=mask_NL, weights_NL=weights_NL, routes=each, examples_N=numbers, lengths=lengths)
