"""Weights that several modules have in common, where an adapter changes these modules apart: they are one no longer.

An output head that is tied to the embedding is the usual case. Trained in full, or with LoRA at one end alone, it and the
embedding are two tensors in the merged model, and its configuration says so (`tie_word_embeddings`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.extra.extra_places import places_in
from lorabank.bank.multihead import weight_name
from lorabank.bank.task_class import skeleton_of
from lorabank.bank.tied import shared_in
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter

TIE = "tie_word_embeddings"


def groups(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one, of each that has several; the model may be on the meta device."""
    users: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(value), []).append(name)
    return [names for names in users.values() if len(names) > 1]


def parted(model: nn.Module, adapter: Adapter) -> list[list[str]]:
    """Those groups of which the adapter changes some apart from others.

    Raises MergeError where rows of a table are trained and its other end is, too: what that end was then isn't known.
    """
    together = shared_in(adapter, {path: layer for path, layer in adaptable_layers(model).items() if path in adapter.layers})
    rows = places_in(model, adapter).shared if adapter.token_rows else {}
    changes: dict[str, str] = {}
    """Parameter → what changes it; equal for those that stay one."""
    layers = adaptable_layers(model)
    for path, layer in adapter.layers.items():
        if path in layers and not layer.stack:
            changes[weight_name(path, layers[path])] = f"layer {together.get(path, path)}"
    for path in adapter.token_rows:
        changes[f"{path}.weight"] = f"rows {path}"
    changes |= {f"{head}.weight": f"rows {table}" for head, table in rows.items()}
    changes |= {f"{path}.bias": f"bias {path}" for path in adapter.biases}
    found: list[list[str]] = []
    for names in groups(model):
        mine = {name: changes.get(name) for name in names} | _whole(adapter, names)
        if len(set(mine.values())) == 1:
            continue
        if (
            any(change is not None and change.startswith("rows") for change in mine.values())
            and len({*mine.values()} - {None}) > 1
        ):
            raise MergeError(
                f"merge: {' and '.join(names)} are one weight, and the adapter has rows of one of them and changes another. "
                "Serve the adapter unmerged, or leave the rows out (trainable_token_indices)."
            )
        found.append(names)
    return found


def _whole(adapter: Adapter, names: list[str]) -> dict[str, str]:
    """Those of one group that modules in full have, each with a word for its values: equal where these are."""
    held: dict[str, torch.Tensor] = {}
    for name in names:
        for path, values in adapter.modules.items():
            if name.startswith(f"{path}.") and name.removeprefix(f"{path}.") in values:
                held[name] = values[name.removeprefix(f"{path}.")]
    found: dict[str, str] = {}
    for name, value in held.items():
        like = next(other for other in held if held[other].shape == value.shape and torch.equal(held[other], value))
        found[name] = f"whole {like}"
    return found


def untie(model: Any, adapter: Adapter) -> list[str]:
    """Give each parameter that the adapter changes apart a tensor of its own, in place, and say so in the configuration.

    model: a transformers model. Returns their names; empty where nothing had to be done. Raises MergeError as `parted` does, and
    for weights that are one by the model's code; the model is then as it was.
    """
    apart = parted(model, adapter)
    if not apart:
        return []
    config = type(model.config).from_dict(untied_settings(model.config.to_dict()))
    without = skeleton_of(type(model), config)
    check_partable(without, adapter, apart)
    first = {name: names[0] for names in groups(without) for name in names}
    made: dict[str, nn.Parameter] = {}
    for names in groups(model):
        made[first.get(names[0], names[0])] = model.get_parameter(names[0])
        for name in names[1:]:
            path, _, leaf = name.rpartition(".")
            held, end = model.get_parameter(name), first.get(name, name)
            made.setdefault(end, nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad))
            model.get_submodule(path)._parameters[leaf] = made[end]
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # what saving takes for tied
    return [name for names in apart for name in names]


def check_partable(without: nn.Module, adapter: Adapter, apart: list[list[str]]) -> None:
    """Raise MergeError where the groups `apart` can't be parted by the configuration.

    without: the model (it may be on the meta device) as a configuration makes it that ties nothing. Either weights of it are one
    all the same, or its code computes something else without ties (Switch Transformers scale what goes into the head).
    """
    way = "Serve the adapter unmerged."
    for names in parted(without, adapter):
        raise MergeError(
            f"merge: {' and '.join(names)} are one weight in a {type(without).__name__}, whatever its configuration says, and "
            f"the adapter changes them apart. {way}"
        )
    for module in without.modules():
        forward = inspect.unwrap(type(module).forward)
        if inspect.isfunction(forward) and TIE in forward.__code__.co_names:
            raise MergeError(
                f"merge: {' and '.join(apart[0])} are one weight, which the adapter changes apart, and a {type(module).__name__} "
                f"computes something else where its configuration says that they are two ({TIE}). {way}"
            )


def untied_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, or a configuration as a dict, that ties no weights, in the model's language model neither."""
    made = {**settings, TIE: False}
    for key, part in settings.items():
        if isinstance(part, Mapping) and part.get(TIE):
            made[key] = {**part, TIE: False}
    return made
