"""Attention of q, k and v that are there already, as torch's `nn.MultiheadAttention` computes it between its projections.

The order of its steps is that of `torch.nn.functional.multi_head_attention_forward` (torch 2.13), so that masks, added keys and
dropout mean the same. Shapes: B rows × T queries or S keys × E features, H heads of D = E / H features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabank.errors import LorabankError


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What an attention module does besides its projections, and how it was called."""

    heads: int
    dropout: float
    """Of the weights; 0 outside of training."""
    bias_k: Tensor | None
    """(1, 1, E), one more key for every query."""
    bias_v: Tensor | None
    zero_key: bool
    """Whether a key and a value of zeros are added."""
    key_padding_mask: Tensor | None
    """(B, S): True, or what is added to the scores of a key."""
    attn_mask: Tensor | None
    """(T, S) or (B · H, T, S): True where a query must not look, or what is added to the scores."""
    is_causal: bool
    """A hint that `attn_mask` is the causal one."""
    need_weights: bool
    average: bool
    """Whether weights are the heads' mean."""

    def __call__(self, q_BTE: Tensor, k_BSE: Tensor, v_BSE: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what the output projection gets (B, T, E), the weights (B, T, S), or (B, H, T, S) where they aren't averaged)."""
        rows = len(q_BTE)
        causal = self.is_causal and self.key_padding_mask is None and not self.need_weights
        masks = [None if causal else self._of_queries(q_BTE, k_BSE.shape[1]), self._of_keys(q_BTE)]
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k_BSE = torch.cat([k_BSE, self.bias_k.to(k_BSE.dtype).expand(rows, 1, -1)], 1)
            v_BSE = torch.cat([v_BSE, self.bias_v.to(v_BSE.dtype).expand(rows, 1, -1)], 1)
            added += 1
        if self.zero_key:
            k_BSE, v_BSE = F.pad(k_BSE, (0, 0, 0, 1)), F.pad(v_BSE, (0, 0, 0, 1))
            added += 1
        present = [F.pad(mask, (0, added)) for mask in masks if mask is not None]
        mask = sum(present[1:], present[0]) if present else None
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_BTE, k_BSE, v_BSE))
        if self.need_weights:
            out, weights = self._with_weights(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout, causal)
            weights = None
        return out.transpose(1, 2).flatten(2), weights

    def _with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        if self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        return weights @ v, weights.mean(1) if self.average else weights

    def _of_queries(self, q_BTE: Tensor, keys: int) -> Tensor | None:
        """`attn_mask` as what is added to scores (B or 1, H or 1, T, S)."""
        if self.attn_mask is None:
            return None
        mask = _added(self.attn_mask, q_BTE)
        return mask[None, None] if mask.ndim == 2 else mask.view(-1, self.heads, *mask.shape[1:])

    def _of_keys(self, q_BTE: Tensor) -> Tensor | None:
        """`key_padding_mask` as what is added to scores (B, 1, 1, S)."""
        return None if self.key_padding_mask is None else _added(self.key_padding_mask, q_BTE)[:, None, None]

    def check(self, rows: int, queries: int, keys: int) -> None:
        """Raise LorabankError for masks that aren't of such a call."""
        padding, mask = self.key_padding_mask, self.attn_mask
        for given in (padding, mask):
            if given is not None and given.dtype != torch.bool and not given.is_floating_point():
                raise LorabankError(
                    f"attention: a mask in {given.dtype}; expected bool (True: not looked at), or floats that are added to scores"
                )
        if self.is_causal and mask is None:
            raise LorabankError("attention: is_causal is a hint about attn_mask, which is None. Give the causal mask as well.")
        if padding is not None and tuple(padding.shape) != (rows, keys):
            raise LorabankError(f"attention: key_padding_mask is {tuple(padding.shape)}; expected (rows, keys), {(rows, keys)}")
        wanted = (queries, keys) if mask is None or mask.ndim == 2 else (rows * self.heads, queries, keys)
        if mask is not None and tuple(mask.shape) != wanted:
            raise LorabankError(
                f"attention: attn_mask is {tuple(mask.shape)}; expected (queries, keys), or (rows · heads, queries, keys): "
                f"{wanted}"
            )


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers that are added to scores: −∞ where a bool one is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)
