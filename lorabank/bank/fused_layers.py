"""Which layers of transformers' models are several projections in one, and which of their outputs are whose.

A layer's class doesn't say: what its module does with the outputs does. So there is a table by model family and name, and a test
holds each line of it to what the model computes. Layers of other models are declared: `attach(model, fused={...})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lorabank.bank.kinds import EXPERTS, SLICE, layer_kind
from lorabank.bank.slices import FusedSlice
from lorabank.bank.wrappers import BASE_LAYER
from lorabank.bank.wrapping import unwrapped
from lorabank.errors import ConfigError, closest
from lorabank.formats.output_slice import OutputSlice

Slices = dict[str, OutputSlice]
"""Name of a projection → its outputs."""
Layout = Callable[[Any, int], Slices | None]
"""(the module that holds the layer, the layer's outputs) → its slices; None where this one isn't fused."""


def one_after_another(sizes: Mapping[str, int]) -> Slices:
    """Projections that lie one behind the other."""
    total, start, found = sum(sizes.values()), 0, Slices()
    for name, size in sizes.items():
        found[name] = OutputSlice(start=start, width=size, period=total, total=total)
        start += size
    return found


def _equal(*names: str) -> Layout:
    def layout(owner: Any, total: int) -> Slices | None:
        return None if total % len(names) else one_after_another(dict.fromkeys(names, total // len(names)))

    return layout


def _by_head(owner: Any, total: int) -> Slices:
    """q, k and v of a head, then those of the next."""
    size = next(vars(owner)[name] for name in ("head_size", "head_dim", "attention_head_size") if name in vars(owner))
    return {name: OutputSlice(start=i * size, width=size, period=3 * size, total=total) for i, name in enumerate(("q", "k", "v"))}


def _grouped(heads: Callable[[Any], tuple[int, int, int]]) -> Layout:
    """All heads of q, then the fewer ones of k and of v; `heads`: module → (of q, of k, a head's size)."""

    def layout(owner: Any, total: int) -> Slices | None:
        q, k, size = heads(owner)
        sizes = {"q": q * size, "k": k * size, "v": k * size}
        return one_after_another(sizes) if sum(sizes.values()) == total else None

    return layout


def _gpt2(owner: Any, total: int) -> Slices | None:
    """A cross-attention layer has its queries elsewhere."""
    names = ("k", "v") if owner.is_cross_attention else ("q", "k", "v")
    return _equal(*names)(owner, total)


def _falcon(owner: Any, total: int) -> Slices | None:
    size, heads, groups = owner.head_dim, owner.num_heads, owner.num_kv_heads
    if owner.new_decoder_architecture:  # a group's queries, then its key and its value
        each = heads // groups
        period = (each + 2) * size
        widths = {"q": (0, each * size), "k": (each * size, size), "v": ((each + 1) * size, size)}
        return {name: OutputSlice(start=a, width=w, period=period, total=total) for name, (a, w) in widths.items()}
    if owner.multi_query:
        return one_after_another({"q": heads * size, "k": size, "v": size})
    return _by_head(owner, total)


def _bigcode(owner: Any, total: int) -> Slices | None:
    if owner.is_cross_attention:
        return None
    if owner.multi_query:
        return one_after_another({"q": total - 2 * owner.head_dim, "k": owner.head_dim, "v": owner.head_dim})
    return _by_head(owner, total)


def _codegen(owner: Any, total: int) -> Slices:
    """Four parts, for as many devices, of queries, values and keys each."""
    period, size = total // 4, total // 12
    return {name: OutputSlice(start=i * size, width=size, period=period, total=total) for i, name in enumerate(("q", "v", "k"))}


def _latent(owner: Any, total: int) -> Slices:
    """Of each head the part of k that has no position, and v, both made of one latent vector."""
    first, second = owner.qk_nope_head_dim, owner.v_head_dim
    period = first + second
    return {
        "k": OutputSlice(start=0, width=first, period=period, total=total),
        "v": OutputSlice(start=first, width=second, period=period, total=total),
    }


def _phi3(owner: Any) -> tuple[int, int, int]:
    return owner.config.num_attention_heads, owner.config.num_key_value_heads, owner.head_dim


FUSED: Mapping[tuple[str, str], Layout] = {
    ("gpt2", "c_attn"): _gpt2,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("gpt_neox", "query_key_value"): _by_head,
    ("bloom", "query_key_value"): _by_head,
    ("persimmon", "query_key_value"): _by_head,
    ("falcon", "query_key_value"): _falcon,
    ("mpt", "Wqkv"): _equal("q", "k", "v"),
    ("codegen", "qkv_proj"): _codegen,
    ("deberta", "in_proj"): _by_head,
    ("deepseek_v2", "kv_b_proj"): _latent,
    ("deepseek_v3", "kv_b_proj"): _latent,
    ("minicpm3", "kv_b_proj"): _latent,
    ("modernbert", "Wqkv"): _equal("q", "k", "v"),
    ("modernbert", "Wi"): _equal("gate", "up"),
    ("phi3", "qkv_proj"): _grouped(_phi3),
    ("phi3", "gate_up_proj"): _equal("gate", "up"),
    ("glm", "gate_up_proj"): _equal("gate", "up"),
    ("glm4", "gate_up_proj"): _equal("gate", "up"),
    ("zamba2", "gate_up_proj"): _equal("gate", "up"),
    ("granitemoehybrid", "input_linear"): _equal("gate", "up"),
    ("blip", "qkv"): _equal("q", "k", "v"),
    ("blip_2", "qkv"): _equal("q", "k", "v"),
    ("qwen2_vl", "qkv"): _equal("q", "k", "v"),
    ("qwen2_5_vl", "qkv"): _equal("q", "k", "v"),
    ("sam", "qkv"): _equal("q", "k", "v"),
    ("vitdet", "qkv"): _equal("q", "k", "v"),
    ("timesformer", "qkv"): _equal("q", "k", "v"),
}
"""(transformers' name of the family, the layer's name in its module) → its layout."""


def known_slices(owner: nn.Module, name: str, total: int) -> Slices | None:
    """The slices of the layer `name` of a module of transformers', None where it isn't in the table."""
    if isinstance(owner, nn.MultiheadAttention):
        return _equal("q", "k", "v")(owner, total) if name == "in_proj" else None
    module = type(owner).__module__.split(".")
    if module[:2] != ["transformers", "models"] or len(module) < 3:
        return None
    layout = FUSED.get((module[2], name))
    return None if layout is None else layout(owner, total)


def slices_of(
    model: nn.Module, layers: Mapping[str, nn.Module], declared: Mapping[str, Slices]
) -> dict[str, dict[str, FusedSlice]]:
    """Of each fused layer among `layers` (path → layer): its slices by name. `declared` ones go before the table's."""
    found: dict[str, dict[str, FusedSlice]] = {}
    for path, layer in layers.items():
        kind = layer_kind(layer)
        if kind is None or not kind.linear or kind.storage in (EXPERTS, SLICE):
            continue
        features = kind.features(layer)
        owner, _, name = path.removesuffix(f".{BASE_LAYER}").rpartition(".")
        slices = declared.get(path) or known_slices(unwrapped(model.get_submodule(owner)), name, features[1])
        if slices:
            found[path] = {part: FusedSlice(layer, outputs, features) for part, outputs in slices.items()}
    return found


def with_slices(layers: Mapping[str, nn.Module], slices: Mapping[str, Mapping[str, FusedSlice]]) -> dict[str, nn.Module]:
    """The layers, each followed by its slices."""
    found: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        found[path] = layer
        found |= {f"{path}.{name}": part for name, part in slices.get(path, {}).items()}
    return found


Declared = Mapping[str, Mapping[str, int] | Sequence[str]]
"""Name of a fused layer, as in `targets` → its projections in order, with their outputs or as equal parts."""


def declared_slices(
    layers: Mapping[str, nn.Module], declared: Declared, matches: Callable[[str, str], bool]
) -> dict[str, Slices]:
    """Path → slices of the layers that a user declares fused. Raises ConfigError for what no layer is."""
    found: dict[str, Slices] = {}
    linear = {path: kind for path, layer in layers.items() if (kind := layer_kind(layer)) is not None and kind.fast is not None}
    for pattern, parts in declared.items():
        named = [path for path in linear if matches(pattern, path)]
        if not named:
            leaves = {path.rpartition(".")[2] for path in linear}
            raise ConfigError(f"fused: {pattern!r} names no linear layer of the model{closest(pattern, leaves)}")
        for path in named:
            found[path] = _as_said(pattern, path, parts, linear[path].features(layers[path])[1])
    return found


def _as_said(pattern: str, path: str, parts: Mapping[str, int] | Sequence[str], total: int) -> Slices:
    where = f"fused[{pattern!r}]"
    if isinstance(parts, str) or not parts or any(not isinstance(name, str) or not name.isidentifier() for name in parts):
        raise ConfigError(
            f"{where}: expected names of projections, such as ['q', 'k', 'v'] or {{'q': 64, 'k': 16}}, got {parts!r}"
        )
    if not isinstance(parts, Mapping):
        if len(set(parts)) != len(parts) or total % len(parts):
            raise ConfigError(
                f"{where}: {path!r} has {total} outputs, which aren't {len(parts)} equal parts of names of their own"
            )
        parts = dict.fromkeys(parts, total // len(parts))
    if any(type(size) is not int or size < 1 for size in parts.values()) or sum(parts.values()) != total:
        raise ConfigError(f"{where}: the parts {dict(parts)!r} don't add up to the {total} outputs of {path!r}")
    return one_after_another(parts)
