"""Which layers an adapter changes: the language of `targets`, `exclude` and `layers`, and its resolution on a model.

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lorabank.bank.fused_layers import Slices, slices_of, with_slices
from lorabank.bank.keep import stack_trains
from lorabank.bank.kinds import CONV, EMBEDDING, own_way
from lorabank.bank.layers import layer_kind
from lorabank.bank.multihead import OUT, Projection, patterned, plays, projections_of
from lorabank.bank.multihead import obstacle as attention_obstacle
from lorabank.bank.owners import BYPASSED, is_named
from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.stacks import ExpertStack, is_registered, obstacle, stacks_of
from lorabank.bank.storages import linear4bit
from lorabank.bank.wrappers import BASE_LAYER, without_wrappers, wraps_base_layer
from lorabank.bank.wrapping import Adapted, unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError, closest

ALL_LINEAR = "all-linear"

_Q = frozenset("q_proj q_lin query query_proj q to_q wq Wq q_a_proj q_b_proj".split())
_K = frozenset("k_proj k_lin key key_proj k to_k wk Wk".split())
_V = frozenset("v_proj v_lin value value_proj v to_v wv Wv".split())
_O = frozenset("o_proj out_proj out_lin o to_out wo_attn c_proj dense".split())
_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention|(^|\.)attn2(\.|$)", re.IGNORECASE)
_TORCHS_CROSS = re.compile(r"(^|\.)multihead_attn(\.|$)")  # of nn.TransformerDecoderLayer, beside its self_attn
_ATTENTION = re.compile(r"att", re.IGNORECASE)


def _parents(path: str) -> str:
    return path.rpartition(".")[0]


def _in_attention(path: str) -> bool:
    return any(_ATTENTION.search(part) for part in _parents(path).split("."))


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


ROLES: Mapping[str, Callable[[str], bool]] = {
    "q": lambda path: _leaf(path) in _Q,
    "k": lambda path: _leaf(path) in _K,
    "v": lambda path: _leaf(path) in _V,
    "o": lambda path: _leaf(path) in _O and _in_attention(path),
    "attention": _in_attention,
    "cross-attention": lambda path: _in_attention(path) and bool(_CROSS.search(path)),
    "mlp": lambda path: _in_block(path) and not _in_attention(path),
}
"""Role → whether a linear layer's path plays it. Names follow transformers' and diffusers' modules."""
WHOLE_ROLES = ("o", "attention", "cross-attention", "mlp")
"""Roles that mean fused layers as a whole; `q`, `k` and `v` mean their slices."""
ALL_OF_A_KIND: Mapping[str, str] = {"all-conv": CONV, "all-embedding": EMBEDDING}
"""Part of `targets` → the `LayerKind.storage` of the layers that it means."""


def output_head_paths(model: nn.Module) -> set[str]:
    """Paths of the modules that map to the vocabulary; empty for a model that doesn't say."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    while isinstance(head, nn.Module) and wraps_base_layer(head):
        head = head._modules.get(BASE_LAYER) or head._modules.get("original_module")
    if not isinstance(head, nn.Module):
        return set()
    return {path for path, module in model.named_modules() if unwrapped(module) is unwrapped(head)}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be adapted, by path, the output head included. Wrapped ones count as their base.

    Each stack of expert weights is one, under its parameter's name.
    """
    bypassed, found = _fused_away(model), dict[str, nn.Module]()
    for path, module in _own_modules(model):
        layer = unwrapped(module)
        found |= {f"{path}.{name}".lstrip("."): projection for name, projection in projections_of(layer).items()}
        if path not in bypassed and path not in found and layer_kind(layer) is not None:
            found[path] = layer
        if not _in_wrapper(path):
            found |= {f"{path}.{name}".lstrip("."): stack for name, stack in stacks_of(layer).items()}
    return found


def _in_wrapper(path: str) -> bool:
    """Whether PEFT wraps a module: experts only where it adapts their parameters, which are no parameters in a call."""
    return _leaf(path) == BASE_LAYER


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of them that are linear over features."""
    return {path: layer for path, layer in adaptable_layers(model).items() if _is_linear(layer)}


def _is_linear(layer: nn.Module) -> bool:
    kind = layer_kind(layer)
    return kind is not None and kind.linear


def _own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of the base model: not the children of our wrappers, nor what PEFT's hold beside their base layer."""
    modules, beside = list(model.named_modules()), list[str]()
    for path, module in modules:
        if isinstance(module, Adapted) or wraps_base_layer(module):
            own = module.base._modules if isinstance(module, Adapted) else (BASE_LAYER,)
            theirs = (child for child in module._modules if child not in own)
            beside += [f"{path}.{child}.".lstrip(".") for child in theirs]
    return ((path, module) for path, module in modules if not f"{path}.".startswith(tuple(beside)))


def _fused_away(model: nn.Module) -> dict[str, str]:
    """Layers that look as if they could be adapted and aren't called, or not always, with the reason."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        layer = unwrapped(module)
        if isinstance(layer, nn.MultiheadAttention) and attention_obstacle(layer) is not None:
            found[f"{path}.{OUT}".lstrip(".")] = "nn.MultiheadAttention reads its weight and never calls it"
        for name, (children, why) in BYPASSED.items():
            if is_named(module, name):
                found |= {f"{path}.{child}".lstrip("."): why for child in children if child in module._modules}
    return found


def unsupported_linear_maps(model: nn.Module) -> dict[str, str]:
    """Linear maps that can't be adapted yet: path to the reason. `all-linear` refuses a model that has any."""
    modules = dict(model.named_modules())
    found = {path: why for path, why in _fused_away(model).items() if not isinstance(unwrapped(modules[path]), _NO_LINEAR_MAPS)}
    heads = output_head_paths(model)
    for path, module in _own_modules(model):
        module = unwrapped(module)
        if path in heads or path in found or layer_kind(module) is not None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            if (why := attention_obstacle(module)) is not None:
                found[path] = f"an nn.MultiheadAttention that isn't supported: {why}"
        elif isinstance(module, nn.LazyLinear):
            found[path] = "LazyLinear has no weight before its first forward pass; run one first"
        elif linear4bit.is_linear4bit(module):
            found[path] = linear4bit.obstacle(module) or f"4-bit type {linear4bit.quant_type(module)} is not supported"
        elif isinstance(module, nn.Linear):
            found[path] = f"{type(module).__name__} has a forward or weight of its own"
        elif isinstance(module, nn.RNNBase):
            found[path] = f"{type(module).__name__} is recurrent, not supported yet"
        elif isinstance(module, nn.Bilinear):
            found[path] = "bilinear maps are not supported"
        elif _looks_linear(module):
            found[path] = f"{type(module).__name__} is not supported yet"
        elif _in_wrapper(path) and stacks_of(module):
            found[path] = "PEFT adapts the parameters of these experts already (target_parameters)"
        elif stacked := _stacked_weights(module):
            what = "stacked expert weights" if _EXPERTS.search(type(module).__name__) else "3-D weights of its own"
            found[path] = f"{type(module).__name__} holds {what} ({', '.join(stacked)}), and {obstacle(module)}"
    return found


_NO_LINEAR_MAPS = (nn.modules.conv._ConvNd, nn.Embedding)
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)


def _looks_linear(module: nn.Module) -> bool:
    names = vars(module)
    weight = module._parameters.get("weight")
    return "in_features" in names and "out_features" in names and weight is not None and weight.ndim == 2


def _stacked_weights(module: nn.Module) -> list[str]:
    """Names of 3-D weights with one matrix an expert. Convolutions, their parametrizations and position tables aren't."""
    if isinstance(module, nn.modules.conv._ConvNd | ParametrizationList) or obstacle(module) is None:
        return []
    present = {name: p for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
    found = [name for name, p in present.items() if p.ndim == 3 and min(p.shape) > 1 and p.is_floating_point()]
    if found or not (is_registered(module) or type(module).__name__.endswith("Experts")):
        return found
    packed = [name for name, p in present.items() if p.ndim >= 3]  # quantised, in a form of their own
    return packed or (["in a form of their own"] if not any(layer_kind(child) for child in module.modules()) else [])


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


def resolve_targets(
    model: nn.Module, config: AdapterConfig, apart: Collection[str] = (), fused: Mapping[str, Slices] | None = None
) -> dict[str, nn.Module]:
    """The layers that `config` adapts, by path, in the model's order. Raises TargetError when any part matches nothing.

    `apart`: paths of modules that train beside the base, which nothing here means. `fused`: slices that were declared of layers.
    """
    adapted = adaptable_layers(model)
    beside = {path: layer for path, layer in adapted.items() if trains_beside(path, layer, apart)}
    whole = {path: layer for path, layer in adapted.items() if path not in beside}
    layers = with_slices(whole, slices_of(model, whole, fused or {}))
    heads = output_head_paths(model)
    chosen: set[str] = set()
    blocks: dict[str, set[int | None]] = {}
    for part in as_list(config.targets):
        if part == ALL_LINEAR:
            _refuse_partial(model, config, apart)
            found = {path for path, layer in whole.items() if path not in heads and _is_linear(layer)}
        else:
            if part in ALL_OF_A_KIND:
                _refuse_others(model, part, config)
            found = _named(part, layers, "targets")
        if not found:
            if path := next((path for path, layer in beside.items() if _part_names(part, path, layer, "targets")), None):
                raise TargetError(
                    f"targets: {part!r} names {path}, which trains beside the base (keep_trainable). Leave it out of one of them."
                )
            raise TargetError(_no_match("targets", part, layers, model))
        blocks[part] = {part_of_block(path) for path in found}
        chosen |= found
    for part in as_list(config.exclude):
        found = {path for path in _named(part, layers, "exclude") if path in whole or path in chosen}
        found |= {path for path in chosen if path not in whole and _parents(path) in found}
        others = [unsupported_linear_maps(model), *(others_of_a_kind(model, kind) for kind in ALL_OF_A_KIND.values())]
        if config.bias == "all":
            others.append({path: "" for path, module in model.named_modules() if module._parameters.get("bias") is not None})
        found |= {path for each in others for path in each if _part_matches(part, path, "exclude")}
        found |= {path for path, layer in beside.items() if _part_names(part, path, layer, "exclude")}
        if not found:
            raise TargetError(_no_match("exclude", part, layers, model))
        chosen -= found
    if config.layers is not None:
        chosen = _in_layers(chosen, config.layers)
        if lost := [part for part, found in blocks.items() if not found & set(config.layers)]:
            raise TargetError(f"targets: {lost[0]!r} is in none of the blocks {list(config.layers)} that `layers` names")
    if not chosen:
        raise TargetError(f"targets {as_list(config.targets)!r} less exclude {as_list(config.exclude)!r} leave no layer to adapt")
    _refuse_twice(chosen, layers)
    found_layers = {path: layer for path, layer in layers.items() if path in chosen}
    _check_patterns("rank_pattern", config.rank_pattern, found_layers)
    _check_patterns("alpha_pattern", config.alpha_pattern, found_layers)
    return found_layers


def meant_by(config: AdapterConfig, layers: Mapping[str, nn.Module], heads: Collection[str]) -> set[str]:
    """Those of `layers` that a configuration means, whether or not each part of it names any. `heads`: output heads' paths."""
    found: set[str] = set()
    for part in as_list(config.targets):
        every = {path for path, layer in layers.items() if path not in heads and _is_linear(layer)}
        found |= (
            {path for path in every if not isinstance(layers[path], FusedSlice)}
            if part == ALL_LINEAR
            else _named(part, layers, "targets")
        )
    out = {path for part in as_list(config.exclude) for path in _named(part, layers, "exclude")}
    blocks = config.layers
    return {
        path
        for path in found
        if path not in out and _parents(path) not in out and (blocks is None or part_of_block(path) in blocks)
    }


def trains_beside(path: str, layer: nn.Module, apart: Collection[str]) -> bool:
    """Whether a layer, or the attention module whose weight it has, or its experts, are of those that train beside the base."""
    if isinstance(layer, ExpertStack):
        return stack_trains(path, layer, apart)
    within = isinstance(layer, Projection) and layer.name != OUT
    return (_parents(path) if within else path) in apart


def _named(part: str, layers: Mapping[str, nn.Module], setting: str) -> set[str]:
    """What a part means; of a fused layer's slices only those whose layer it doesn't mean, and none for a whole role."""
    found = {
        path for path, layer in layers.items() if not isinstance(layer, FusedSlice) and _part_names(part, path, layer, setting)
    }
    if part in WHOLE_ROLES or part in ALL_OF_A_KIND:
        return found
    slices = (path for path, layer in layers.items() if isinstance(layer, FusedSlice) and _parents(path) not in found)
    return found | {path for path in slices if _part_matches(part, path, setting)}


def _refuse_twice(chosen: Collection[str], layers: Mapping[str, nn.Module]) -> None:
    for path in chosen:
        if isinstance(layers[path], FusedSlice) and _parents(path) in chosen:
            raise TargetError(
                f"targets name {_parents(path)!r} and its slice {_leaf(path)!r}: expected the whole layer, or slices of it. "
                "Leave one of both out."
            )


def _part_names(part: str, path: str, layer: nn.Module, setting: str) -> bool:
    """Whether a part means this layer: by what it is, or by where it is."""
    if part in ALL_OF_A_KIND:
        kind = layer_kind(layer)
        return kind is not None and kind.storage == ALL_OF_A_KIND[part]
    if isinstance(layer, ExpertStack | Projection) and part not in ROLES and _part_matches(part, _parents(path), setting):
        return True  # the module of the stacks, or of the attention, was named
    if isinstance(layer, Projection) and part in ROLES:
        return plays(part, layer, bool(_CROSS.search(path) or _TORCHS_CROSS.search(path)))
    return _part_matches(part, path, setting) and (part not in ROLES or setting == "exclude" or _is_linear(layer))


def _part_matches(part: str, path: str, setting: str) -> bool:
    try:
        return matches(part, path)
    except re.error as error:
        raise TargetError(f"{setting}: {part!r} is no regular expression: {error}") from error


def _check_patterns(setting: str, patterns: Mapping[str, float], chosen: Mapping[str, nn.Module]) -> None:
    for key, value in patterns.items():
        try:
            used = any(patterned({key: value}, without_wrappers(path), layer, 0) for path, layer in chosen.items())
        except re.error as error:
            raise TargetError(f"{setting}: {key!r} is no regular expression: {error}") from error
        if not used:
            hint = closest(key, {_leaf(path) for path in chosen})
            raise TargetError(f"{setting}[{key!r}] matches none of the {len(chosen)} adapted layers{hint}")


def _refuse_partial(model: nn.Module, config: AdapterConfig, apart: Collection[str]) -> None:
    unsupported = {path: why for path, why in unsupported_linear_maps(model).items() if path not in apart}
    excluded = as_list(config.exclude)
    left = {p: why for p, why in unsupported.items() if not any(_part_matches(part, p, "exclude") for part in excluded)}
    if left:
        shown = "; ".join(f"{path} ({why})" for path, why in list(left.items())[:3])
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        raise TargetError(
            f"targets: 'all-linear' would leave {len(left)} linear maps unadapted: {shown}{more}. "
            "Name the layers that you want (such as targets=['attention']), or exclude these on purpose."
        )


def others_of_a_kind(model: nn.Module, kind: str) -> dict[str, str]:
    """Convolutions, or embeddings, that can't be adapted: path to the reason."""
    bypassed, found = _fused_away(model), dict[str, str]()
    classes = (nn.modules.conv._ConvNd,) if kind == CONV else (nn.Embedding, nn.EmbeddingBag)
    for path, module in _own_modules(model):
        module = unwrapped(module)
        if isinstance(module, classes) and (path in bypassed or layer_kind(module) is None):
            named = f"a {type(module).__name__} isn't supported yet" if type(module).__module__.startswith("torch.") else ""
            found[path] = bypassed.get(path) or own_way(module) or named or f"{type(module).__name__} has a forward of its own"
    return found


def _refuse_others(model: nn.Module, part: str, config: AdapterConfig) -> None:
    excluded = as_list(config.exclude)
    others = others_of_a_kind(model, ALL_OF_A_KIND[part])
    left = {path: why for path, why in others.items() if not any(_part_matches(e, path, "exclude") for e in excluded)}
    if left:
        raise TargetError(
            f"targets: {part!r} would leave {_listed(left)}. Name the layers that you want, or exclude these on purpose."
        )


def _listed(left: Mapping[str, str]) -> str:
    shown = "; ".join(f"{path} ({why})" for path, why in list(left.items())[:3])
    return f"{len(left)} unadapted: {shown}{f'; and {len(left) - 3} more' if len(left) > 3 else ''}"


def part_of_block(path: str) -> int | None:
    """A block's index, the first number in a path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _in_layers(paths: set[str], wanted: Sequence[int]) -> set[str]:
    """Paths in the wanted blocks."""
    indices = {path: part_of_block(path) for path in paths}
    present = {i for i in indices.values() if i is not None}
    missing = sorted(set(wanted) - present)
    if missing:
        have = f"blocks {min(present)} to {max(present)}" if present else "no numbered blocks"
        raise TargetError(f"layers: no block {', '.join(map(str, missing))}; the targeted layers have {have}")
    return {path for path, index in indices.items() if index in set(wanted)}


def _no_match(setting: str, part: str, layers: Mapping[str, nn.Module], model: nn.Module) -> str:
    others = unsupported_linear_maps(model)
    for kind in ALL_OF_A_KIND.values():
        others |= others_of_a_kind(model, kind)
    meant = ALL_OF_A_KIND.get(part)
    unsupported = {
        path: why
        for path, why in (others if meant is None else others_of_a_kind(model, meant)).items()
        if meant is not None or (part not in ROLES and matches(part, path))
    }
    if unsupported:
        path, why = next(iter(unsupported.items()))
        return f"{setting}: {part!r} names {path}, which can't be adapted: {why}"
    modules = {path: module for path, module in model.named_modules() if path and part not in ROLES and matches(part, path)}
    if modules:
        path, module = next(iter(modules.items()))
        inside = any(name.startswith(f"{path}.") for name in layers)
        way_out = f"name the layers inside it, such as '{part}.*'" if inside else "linear layers, convolutions and embeddings can"
        return f"{setting}: {part!r} names {path}, a {type(unwrapped(module)).__name__}, which can't be adapted yet; {way_out}"
    names = sorted({_leaf(path) for path in layers})
    length = part.count(".") + 1
    ends = names if length == 1 else sorted({".".join(path.split(".")[-length:]) for path in layers})
    hint = closest(part, [name for name in (*ends, *ROLES, ALL_LINEAR, *ALL_OF_A_KIND) if name != part])
    fused = " (this model may fuse q, k and v into one layer)" if part in ("q", "k", "v") else ""
    what = ALL_OF_A_KIND.get(part, "linear layer" if part in ROLES else "layer")
    return f"{setting}: {part!r} matches no {what} of the model{hint}{fused}. It has: {', '.join(names) or 'none'}"
