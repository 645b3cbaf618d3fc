"""Our attention in a transformers model while a step runs, through transformers' own attention interface.

A model that would use torch's scaled_dot_product_attention asks for `lorabank` instead on a CPU: attention.c where it suits
(fp32, no mask, no dropout), torch's otherwise, with masks as for torch's. On a GPU it asks for `lorabank_causal`, for which no
masks are built: behind a causal attention, padding on the right reaches no real token, and torch's fastest kernels take no
mask; in half precision for `lorabank_windowed`, which needs none for a window that is shorter than the rows either, or for
`lorabank_fa4`, which is FlashAttention 4's where that is installed. Packed rows ask for `lorabank_packed`
everywhere: see packed_attention.py.

A pass on a GPU in which an attention may get a mask does without cuDNN's (see `without_cudnn`), which torch would prefer there.
The backward of an attention is that of the kernel that forward chose, and a recomputed forward runs inside the pass too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorabank.engine.varlen import suits_varlen, varlen_attention, varlen_missing
from lorabank.kernels.gpu import flash
from lorabank.kernels.native import attention, library
from lorabank.notices import warn_once

NAME = "lorabank"
CAUSAL = "lorabank_causal"
FLASH = "lorabank_fa4"
"""Without the word that transformers knows its own flash attention by."""
WINDOWED = "lorabank_windowed"
MASKED = "lorabank_masked"
BLIND = "lorabank_blind"
"""As `MASKED`, but no mask is left out for what it hides: a captured pass can't look, and must do as those before it."""
PACKED = "lorabank_packed"
_KEY = "_attn_implementation_internal"
"""Where a configuration keeps the name; its public setter would pass it on to sub-configurations too."""
_PLAIN = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "sliding_window"}
)
"""Arguments that reach the attention function and say nothing about a call without a mask."""
_NAMED = frozenset({"dropout", "scaling", "is_causal"})
"""Arguments that are looked at by name."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Where a configuration keeps how far back its layers see."""


def asks_nothing(kwargs: Mapping[str, Any]) -> bool:
    """Whether what a model gives its attention beside the usual says nothing that would change the result."""
    return all(value is None or value is False or name in _PLAIN for name, value in kwargs.items())


def scale_of(query: Tensor, scaling: float | None) -> float:
    """What scores are multiplied by: the model's own number, or what is usual for its heads."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def sees_behind_only(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether an attention is causal, by the call or else by the module, as transformers has it."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: q (B, H, T, D), k and v (B, G, T, D) → (B, T, H, D), and no attention weights."""
    plain = attention_mask is None and not dropout and asks_nothing(kwargs)
    if plain and not torch.is_autocast_enabled("cpu") and attention.suits(query, key, value):
        scale, causal = scale_of(query, scaling), sees_behind_only(module, is_causal)
        return attention.attention(query, key, value, scale=scale, causal=causal), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for a causal model whose rows are padded on the right, if at all. A window that is too short gets a mask."""
    mask, length = attention_mask, key.shape[2]  # none, unless the model makes masks of its own
    if mask is None and sliding_window is not None and sliding_window < length:
        place = torch.arange(length, device=key.device)
        behind = place[:, None] - place[None, :]
        mask = ((behind >= 0) & (behind < sliding_window))[None, None]
    if mask is None and _repeats_keys(query, key):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        behind_only = query.shape[2] > 1 and sees_behind_only(module, is_causal)
        y = scaled_dot_product_attention(query, key, value, None, dropout, behind_only, scale=scaling)
        return y.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _repeats_keys(query: Tensor, key: Tensor) -> bool:
    """Whether key heads are shared on a GPU whose fast kernels don't take that, so that all scores would be held."""
    if not query.is_cuda or key.shape[1] == query.shape[1]:
        return False
    return query.dtype == torch.float32 or torch.cuda.get_device_capability(query.device) < (8, 0)


def windowed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """`causal_attention`, without a mask where torch's variable-length attention takes a window that is shorter than the rows."""
    window, (rows, _, length, _) = given.get("sliding_window"), query.shape
    short = attention_mask is None and window is not None and window < length and key.shape[2] == length
    plain = short and not given.get("dropout") and asks_nothing({k: v for k, v in given.items() if k not in _NAMED})
    if window is None or not plain or not sees_behind_only(module, given.get("is_causal")) or not suits_varlen(query, key, value):
        return causal_attention(module, query, key, value, attention_mask, **given)
    starts_S = torch.arange(rows + 1, device=query.device, dtype=torch.int32) * length
    scale = scale_of(query, given.get("scaling"))
    return varlen_attention(query, key, value, starts_S, scale=scale, causal=True, window=window), None


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """`windowed_attention`, and rows without a window by FlashAttention 4's kernels, where they do what is asked for."""
    window = given.get("sliding_window")
    beyond = attention_mask is not None or given.get("dropout") or (window is not None and window < key.shape[2])
    if beyond or not flash.takes(query, key, value) or not asks_nothing({k: v for k, v in given.items() if k not in _NAMED}):
        return windowed_attention(module, query, key, value, attention_mask, **given)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale, causal = scale_of(query, given.get("scaling")), sees_behind_only(module, given.get("is_causal"))
    return flash.flash_attention(q, k, v, scale, causal)[0], None


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own, under a name of ours.

    A compiled block keeps the kernel that was chosen when it was traced, and traced outside of our passes, for `sdpa`, cuDNN's.
    """
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def blind_mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **given: Any,
) -> Tensor | None:
    """What `sdpa_mask` makes, but of the same shape whatever it hides, and in a capture as elsewhere.

    A causal mask is always made: without `attention_mask`, transformers looks at positions for rows that are packed, and in a
    capture, where it can't look, takes them for such (5.10 makes the others there too).
    """
    windowed = local_size is not None and kv_length >= local_size
    if allow_is_bidirectional_skip and attention_mask is None and not windowed:
        return None
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(kv_length=kv_length, attention_mask=attention_mask, local_size=local_size, **given)
    return None if mask is None else mask.contiguous()  # compiled code depends on strides


# pointers in a struct are nothing to trace: under torch.compile each of our attentions is a graph break, and right
AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(MASKED, masked_attention)
AttentionMaskInterface.register(MASKED, sdpa_mask)
AttentionInterface.register(BLIND, masked_attention)
AttentionMaskInterface.register(BLIND, blind_mask)
AttentionInterface.register(FLASH, flash_attention)
AttentionInterface.register(WINDOWED, windowed_attention)
AttentionInterface.register(CAUSAL, causal_attention)  # and no masks: transformers builds none for a name without a mask function


class _WithoutCudnn:
    """How many passes want torch to choose among the other kernels, and what was set before the first: the switch is global."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """torch's attention without cuDNN's kernels, in all threads: backward on a GPU runs in another.

        With a mask, their backward on Hopper GPUs gives NaN as q's gradient for rows of 64, 192, 320, ... tokens where scores are
        far below zero, and so for queries that see nothing (torch 2.11 to 2.13, github.com/pytorch/pytorch/issues/196678).
        """
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.backends.cuda.enable_cudnn_sdp(self._before)


without_cudnn = _WithoutCudnn()


@contextlib.contextmanager
def own_attention(
    modules: Iterable[nn.Module],
    device: torch.device,
    *,
    maskless: bool = False,
    fast: bool = False,
    packed: bool = False,
    blind: bool = False,
    length: int | None = None,
) -> Iterator[None]:
    """Our attention for `modules` (`model.modules()`), its own afterwards.

    `maskless`: on a GPU, for a model that maskless.py found fit; `fast`: in half precision, by FlashAttention 4 then, and windows
    by torch's variable-length attention. `packed`: for packed rows whose boundaries go to the attention (see packing.py).
    `blind`: on a GPU, with masks whose values aren't looked at, for passes that are captured. `length`: of the rows, where it is
    known that no attention but a window's gets a mask: then a GPU may use cuDNN's attention for rows that no window is too short
    for.
    """
    configs = configurations(modules)
    usual = (
        (BLIND if blind else MASKED)
        if device.type == "cuda"
        else NAME
        if device.type == "cpu" and library.loaded() is not None
        else None
    )
    causal = (FLASH if _flash_is_ready(configs, device) else WINDOWED) if maskless and fast else CAUSAL
    name = PACKED if packed else causal if maskless else usual
    reached = length is not None and bool(reached_windows(configs, length))
    unmasked = maskless and length is not None and not reached
    if maskless and fast and reached:
        _tell_of_windows(configs, device)
    changed: list[dict[str, Any]] = []
    with contextlib.nullcontext() if unmasked or device.type != "cuda" else without_cudnn():
        try:
            for config in configs if name is not None else ():
                if config._attn_implementation == "sdpa":
                    vars(config)[_KEY] = name
                    changed.append(vars(config))
            yield
        finally:
            for settings in changed:
                if settings[_KEY] == name:  # unless somebody chose another meanwhile
                    settings[_KEY] = "sdpa"


def _flash_is_ready(configs: Sequence[PreTrainedConfig], device: torch.device) -> bool:
    """Whether FlashAttention 4 takes the heads of all attentions."""
    kinds = head_kinds(configs)
    return bool(kinds) and all(flash.ready(device, *kind) for kind in kinds)


def _tell_of_windows(configs: Sequence[PreTrainedConfig], device: torch.device) -> None:
    """Say that windows take masks, where torch's variable-length attention isn't for their heads."""
    for features, _ in sorted(head_kinds(configs)):
        if (why := varlen_missing(device, torch.bfloat16, features)) is not None:
            warn_once(
                f"rows are longer than the sliding windows of {type(configs[0]).__name__}, so attention takes a mask there, "
                "whose memory and time grow with the square of a row's length: torch's variable-length attention isn't for it, "
                f"{why}."
            )


def head_kinds(configs: Iterable[PreTrainedConfig]) -> set[tuple[int, int]]:
    """(features of a head, query heads that share a key head) of all attentions; empty where a configuration doesn't say."""
    kinds: set[tuple[int, int]] = set()
    for config in configs:
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int) or not heads:
            return set()
        size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
        kinds.add((size, heads // (getattr(config, "num_key_value_heads", None) or heads)))
    return kinds


def reached_windows(configs: Iterable[PreTrainedConfig], length: int) -> tuple[int, ...]:
    """Sizes of the windows that rows of `length` tokens reach beyond."""
    sizes = {getattr(config, name, None) for config in configs for name in WINDOWS}
    return tuple(sorted(size for size in sizes if isinstance(size, int) and 0 < size < length))


def configurations(modules: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """The configurations that the modules read, none if one of them treats torch's attention as a special case."""
    found: dict[int, PreTrainedConfig] = {}
    for module in modules:
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            if any(_names_sdpa(kind.__module__) for kind in type(module).__mro__ if _is_modeling(kind.__module__)):
                return []
            found[id(config)] = config
    return list(found.values())


def _is_modeling(module_name: str) -> bool:
    """Whether a class from there is some model's own, not torch's or the base of all of transformers' models."""
    top = module_name.partition(".")[0]
    return top not in ("torch", "builtins", "abc", "typing") and (
        top != "transformers" or module_name.startswith("transformers.models.")
    )


@functools.cache
def _names_sdpa(module_name: str) -> bool:
    """Whether a module's code asks whether the attention is `sdpa` (and would do something else for another name)."""
    file = vars(sys.modules[module_name]).get("__file__") if module_name in sys.modules else None
    if file is None or not Path(file).is_file():
        return True
    text = Path(file).read_text(encoding="utf-8")
    return '"sdpa"' in text or "'sdpa'" in text
