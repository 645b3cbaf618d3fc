"""Whether a causal model does without attention masks for a batch that is padded on the right, seen on a probe.

Without masks a GPU has faster attention, so this must not be wrong: what each attention is told to see is compared, with a mask
and without, which is exact whatever the model's dtype. Hidden states are compared besides, for what goes another way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE
from lorabank.engine.attention import WINDOWS, configurations, own_attention
from lorabank.engine.head import SplitHead
from lorabank.engine.modes import evaluation_mode

ANY = sys.maxsize
"""Tokens of a row where there is no limit."""
LONGEST_PROBE = 8192
_SHORTEST = 6
_HIDDEN = -1e4
"""A number of a mask that hides a key, or less."""


def longest_without_masks(bank: AdapterBank, split: SplitHead, rows: int = ANY) -> int:
    """Tokens of the longest rows for which the body needs no attention masks; `ANY`: no limit; 0: none.

    `rows`: tokens of those that are asked about. A window that they don't reach beyond, or one too long to be probed, isn't
    looked at and is the limit. Right for real tokens; what comes out behind them, in the padding, is another matter.
    """
    modules = list(bank.model.modules())
    found = _probe_length(modules, rows)
    if found is None:
        return 0
    length, limit = found
    ids = torch.arange(2 * length, device=bank.device).view(2, length) % max(1, split.head.out_features)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    # compiled code shows nobody what it does, and what it would be compiled for here comes but once
    with torch.no_grad(), evaluation_mode(modules), bank.route(BASE), torch.compiler.set_stance("force_eager"):
        with own_attention(modules, bank.device), _Watched() as masked:
            expected = split.hidden(ids, mask)[mask.bool()].float()
        with own_attention(modules, bank.device, maskless=True, length=length), _Watched() as free:
            hidden = split.hidden(ids, None)[mask.bool()].float()
    if len(masked.sights) != len(free.sights) or not all(map(_Sight.same, masked.sights, free.sights)):
        return 0
    if any(sight.own for sight in free.sights):
        return 0  # the model makes masks of its own, which may say more for longer rows
    coarse = split.head.weight.dtype != torch.float32
    if not bool((hidden - expected).norm() <= (5e-2 if coarse else 1e-4) * expected.norm()):
        return 0
    if coarse and not free.sights:  # an attention of the model's own, whose window this wouldn't show
        return min([limit, *_windows(modules)])
    return limit


def _probe_length(modules: Sequence[nn.Module], rows: int) -> tuple[int, int] | None:
    """(tokens that show every window that can be shown, tokens above which others begin); None: masks are known to be needed."""
    configs = configurations(modules)
    for config in configs:
        kinds = set(getattr(config, "layer_types", None) or ())
        if config._attn_implementation != "sdpa" or not kinds <= {"full_attention", "sliding_attention"}:
            return None
        if getattr(config, "attention_chunk_size", None):
            return None
    shown = [window for window in _windows(modules) if window < rows and window + 4 <= LONGEST_PROBE]
    others = [window for window in _windows(modules) if window not in shown]
    return (max([_SHORTEST, *(window + 4 for window in shown)]), min([ANY, *others])) if configs else None


def _windows(modules: Sequence[nn.Module]) -> list[int]:
    found = (getattr(config, WINDOWS[0], None) for config in configurations(modules))
    return [window for window in found if isinstance(window, int) and window > 0]


@dataclass(frozen=True)
class _Sight:
    """Which keys the queries of an attention see: the first, the last and how many, each (N or 1, H or 1, T)."""

    first: Tensor
    last: Tensor
    count: Tensor
    biased: bool = False
    """The mask does more than hide."""
    masked: bool = False

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> _Sight:  # fmt: skip
        """What `scaled_dot_product_attention` is asked for."""
        queries, keys = query.shape[-2], key.shape[-2]
        if attn_mask is None:
            last = (
                torch.arange(queries, device=query.device) if is_causal else torch.full((queries,), keys - 1, device=query.device)
            )
            return cls(torch.zeros_like(last)[None, None], last[None, None], (last + 1)[None, None])
        mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
        seen = mask if mask.dtype == torch.bool else mask == 0
        biased = mask.dtype != torch.bool and not bool((seen | (mask <= _HIDDEN)).all())
        bits = seen.to(torch.uint8)
        return cls(
            bits.argmax(-1), keys - 1 - bits.flip(-1).argmax(-1), seen.sum(-1), biased, masked=True,
        )  # fmt: skip

    def same(self, other: _Sight) -> bool:
        """Whether both see the same, of two rows of which the second ends in two tokens of padding."""
        if self.biased or other.biased:
            return False
        for mine, theirs in ((self.first, other.first), (self.last, other.last), (self.count, other.count)):
            if mine.ndim != 3 or theirs.ndim != 3 or mine.shape[2] != theirs.shape[2]:
                return False
            rows, heads = max(mine.shape[0], theirs.shape[0]), max(mine.shape[1], theirs.shape[1])
            if rows > 2:
                return False
            a, b = (x.expand(2, heads, -1) for x in (mine, theirs))
            if not torch.equal(a[0], b[0]) or not torch.equal(a[1, :, :-2], b[1, :, :-2]):
                return False
        return True

    @property
    def own(self) -> bool:
        """Whether there was a mask that hides nothing which order doesn't hide: no window of ours, so the model's."""
        order = torch.arange(self.last.shape[-1], device=self.last.device)
        return self.masked and bool((self.first == 0).all() and (self.last[:1] == order).all())


class _Watched(TorchFunctionMode):
    """Watches what torch's attention is asked for inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sights: list[_Sight] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.sights.append(_Sight.of(*args, **given))
        return func(*args, **given)
