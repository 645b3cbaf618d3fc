"""An adapter's own rows of an embedding, or of an output head, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Rows of one table that an adapter replaces by its own (PEFT's `trainable_token_indices`)."""

    ids: tuple[int, ...]
    """Whose; each once."""
    rows: Tensor
    """(ids, features), in the order of `ids`."""
