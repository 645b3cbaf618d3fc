"""What one part of `targets`, or of `exclude`, names.

A part of `targets` is one of
  - `all-linear`: every linear layer but the output head;
  - `all-conv`, `all-embedding`: every convolution, every embedding, those of positions included;
  - a role, of linear layers: `q k v o attention cross-attention mlp`;
  - a module name (`q_proj`), or a path's end (`self_attn.q_proj`);
  - a glob (`model.layers.*.mlp.*_proj`), or a regular expression that matches a whole path (`re:.*\\.[qk]_proj`).
A part that matches no layer is an error: a target never fails in silence.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lorabank.bank.adaptable import is_linear
from lorabank.bank.kinds import CONV, EMBEDDING, layer_kind
from lorabank.bank.multihead import Projection, plays
from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.wrappers import BASE_LAYER, without_wrappers
from lorabank.errors import TargetError

ALL_LINEAR = "all-linear"

_Q = frozenset("q_proj q_lin query query_proj q to_q wq Wq q_a_proj q_b_proj".split())
_K = frozenset("k_proj k_lin key key_proj k to_k wk Wk".split())
_V = frozenset("v_proj v_lin value value_proj v to_v wv Wv".split())
_O = frozenset("o_proj out_proj out_lin o to_out wo_attn c_proj dense".split())
_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention|(^|\.)attn2(\.|$)", re.IGNORECASE)
_TORCHS_CROSS = re.compile(r"(^|\.)multihead_attn(\.|$)")  # of nn.TransformerDecoderLayer, beside its self_attn
_ATTENTION = re.compile(r"att", re.IGNORECASE)


def parents(path: str) -> str:
    """The path of the module that a layer is in; empty for the model."""
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    """A layer's own name."""
    return path.rpartition(".")[2]


def _in_attention(path: str) -> bool:
    return any(_ATTENTION.search(part) for part in parents(path).split("."))


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


ROLES: Mapping[str, Callable[[str], bool]] = {
    "q": lambda path: leaf(path) in _Q,
    "k": lambda path: leaf(path) in _K,
    "v": lambda path: leaf(path) in _V,
    "o": lambda path: leaf(path) in _O and _in_attention(path),
    "attention": _in_attention,
    "cross-attention": lambda path: _in_attention(path) and bool(_CROSS.search(path)),
    "mlp": lambda path: _in_block(path) and not _in_attention(path),
}
"""Role → whether a linear layer's path plays it. Names follow transformers' and diffusers' modules."""

WHOLE_ROLES = ("o", "attention", "cross-attention", "mlp")
"""Roles that mean fused layers as a whole; `q`, `k` and `v` mean their slices."""

ALL_OF_A_KIND: Mapping[str, str] = {"all-conv": CONV, "all-embedding": EMBEDDING}
"""Part of `targets` → the `LayerKind.storage` of the layers that it means."""


def as_list(value: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def matches(pattern: str, path: str) -> bool:
    """Whether one part of `targets` (none of `all-…`) matches a layer's path, PEFT's wrappers in it left out or not."""
    return _matches(pattern, path) or (BASE_LAYER in path and _matches(pattern, without_wrappers(path)))


def _matches(pattern: str, path: str) -> bool:
    if pattern in ROLES:
        return ROLES[pattern](path)
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")


def named_by(part: str, layers: Mapping[str, nn.Module], setting: str) -> set[str]:
    """What a part means; of a fused layer's slices only those whose layer it doesn't mean, and none for a whole role."""
    found = {
        path for path, layer in layers.items() if not isinstance(layer, FusedSlice) and part_names(part, path, layer, setting)
    }
    if part in WHOLE_ROLES or part in ALL_OF_A_KIND:
        return found
    slices = (path for path, layer in layers.items() if isinstance(layer, FusedSlice) and parents(path) not in found)
    return found | {path for path in slices if part_matches(part, path, setting)}


def part_names(part: str, path: str, layer: nn.Module, setting: str) -> bool:
    """Whether a part means this layer: by what it is, or by where it is."""
    if part in ALL_OF_A_KIND:
        kind = layer_kind(layer)
        return kind is not None and kind.storage == ALL_OF_A_KIND[part]
    if isinstance(layer, ExpertStack | Projection) and part not in ROLES and part_matches(part, parents(path), setting):
        return True  # the module of the stacks, or of the attention, was named
    if isinstance(layer, Projection) and part in ROLES:
        return plays(part, layer, bool(_CROSS.search(path) or _TORCHS_CROSS.search(path)))
    return part_matches(part, path, setting) and (part not in ROLES or setting == "exclude" or is_linear(layer))


def part_matches(part: str, path: str, setting: str) -> bool:
    """As `matches`. Raises TargetError, naming the setting, for what is no regular expression."""
    try:
        return matches(part, path)
    except re.error as error:
        raise TargetError(f"{setting}: {part!r} is no regular expression: {error}") from error


def part_of_block(path: str) -> int | None:
    """A block's index, the first number in a path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
