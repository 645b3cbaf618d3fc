"""Which layers an adapter changes: `targets`, `exclude` and `layers` of a configuration, resolved on a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lorabank.bank.adaptable import adaptable_layers, is_linear, others_of_a_kind, output_head_paths, unsupported_linear_maps
from lorabank.bank.fused_layers import Slices, slices_of, with_slices
from lorabank.bank.keep import stack_trains
from lorabank.bank.multihead import OUT, Projection, patterned
from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.target_parts import (
    ALL_LINEAR,
    ALL_OF_A_KIND,
    as_list,
    leaf,
    named_by,
    parents,
    part_matches,
    part_names,
    part_of_block,
)
from lorabank.bank.target_refusals import no_match, refuse_others, refuse_partial
from lorabank.bank.wrappers import without_wrappers
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError, closest


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
            refuse_partial(model, config, apart)
            found = {path for path, layer in whole.items() if path not in heads and is_linear(layer)}
        else:
            if part in ALL_OF_A_KIND:
                refuse_others(model, part, config)
            found = named_by(part, layers, "targets")
        if not found:
            if path := next((path for path, layer in beside.items() if part_names(part, path, layer, "targets")), None):
                raise TargetError(
                    f"targets: {part!r} names {path}, which trains beside the base (keep_trainable). Leave it out of one of them."
                )
            raise TargetError(no_match("targets", part, layers, model))
        blocks[part] = {part_of_block(path) for path in found}
        chosen |= found
    for part in as_list(config.exclude):
        found = {path for path in named_by(part, layers, "exclude") if path in whole or path in chosen}
        found |= {path for path in chosen if path not in whole and parents(path) in found}
        others = [unsupported_linear_maps(model), *(others_of_a_kind(model, kind) for kind in ALL_OF_A_KIND.values())]
        if config.bias == "all":
            others.append({path: "" for path, module in model.named_modules() if module._parameters.get("bias") is not None})
        found |= {path for each in others for path in each if part_matches(part, path, "exclude")}
        found |= {path for path, layer in beside.items() if part_names(part, path, layer, "exclude")}
        if not found:
            raise TargetError(no_match("exclude", part, layers, model))
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
        every = {path for path, layer in layers.items() if path not in heads and is_linear(layer)}
        found |= (
            {path for path in every if not isinstance(layers[path], FusedSlice)}
            if part == ALL_LINEAR
            else named_by(part, layers, "targets")
        )
    out = {path for part in as_list(config.exclude) for path in named_by(part, layers, "exclude")}
    blocks = config.layers
    return {
        path
        for path in found
        if path not in out and parents(path) not in out and (blocks is None or part_of_block(path) in blocks)
    }


def trains_beside(path: str, layer: nn.Module, apart: Collection[str]) -> bool:
    """Whether a layer, or the attention module whose weight it has, or its experts, are of those that train beside the base."""
    if isinstance(layer, ExpertStack):
        return stack_trains(path, layer, apart)
    within = isinstance(layer, Projection) and layer.name != OUT
    return (parents(path) if within else path) in apart


def _refuse_twice(chosen: Collection[str], layers: Mapping[str, nn.Module]) -> None:
    for path in chosen:
        if isinstance(layers[path], FusedSlice) and parents(path) in chosen:
            raise TargetError(
                f"targets name {parents(path)!r} and its slice {leaf(path)!r}: expected the whole layer, or slices of it. "
                "Leave one of both out."
            )


def _check_patterns(setting: str, patterns: Mapping[str, float], chosen: Mapping[str, nn.Module]) -> None:
    for key, value in patterns.items():
        try:
            used = any(patterned({key: value}, without_wrappers(path), layer, 0) for path, layer in chosen.items())
        except re.error as error:
            raise TargetError(f"{setting}: {key!r} is no regular expression: {error}") from error
        if not used:
            hint = closest(key, {leaf(path) for path in chosen})
            raise TargetError(f"{setting}[{key!r}] matches none of the {len(chosen)} adapted layers{hint}")


def _in_layers(paths: set[str], wanted: Sequence[int]) -> set[str]:
    """Paths in the wanted blocks."""
    indices = {path: part_of_block(path) for path in paths}
    present = {i for i in indices.values() if i is not None}
    missing = sorted(set(wanted) - present)
    if missing:
        have = f"blocks {min(present)} to {max(present)}" if present else "no numbered blocks"
        raise TargetError(f"layers: no block {', '.join(map(str, missing))}; the targeted layers have {have}")
    return {path for path, index in indices.items() if index in set(wanted)}
