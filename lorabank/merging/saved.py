"""Modules that an adapter trained in full, merged: the model takes the adapter's values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorabank.bank.in_full.saved_paths import unsavable
from lorabank.bank.wrapping import unwrapped
from lorabank.errors import MergeError, closest
from lorabank.formats.adapter import Adapter

RESIZE = (
    "Load the base with as many labels; where tokens were added, resize its token embeddings as they were in training "
    "(model.resize_token_embeddings)."
)


def fitting_modules(model: nn.Module, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each parameter in the adapter's modules → (the model's own, the adapter's values), all checked.

    Raises MergeError for a module that the model lacks or has in another shape, or whose parameter is another's, too, which the
    adapter doesn't have with the same values.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    users: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), []).append(name)
    for path, values in adapter.modules.items():
        for key, value in values_for(model, path, values).items():
            own = unwrapped(model.get_submodule(path)).get_parameter(key)
            others = [name for name in users.get(id(own), ()) if not name.startswith(f"{path}.")]
            if others := [name for name in others if not _same(adapter, name, value)]:
                raise MergeError(
                    f"merge: {path}.{key} is tied to {', '.join(others)}: merging would change both, the adapter changes one. "
                    "Merge the model's folder (lorabank merge), which unties them, or serve the adapter unmerged."
                )
            found[f"{path}.{key}"] = own, value
    return found


def values_for(model: nn.Module, path: str, values: Mapping[str, Tensor], *, unloaded: bool = False) -> dict[str, Tensor]:
    """The adapter's values of one module's parameters, checked against the model's. Raises MergeError.

    unloaded: the model is on the meta device and stands for a folder's.
    """
    present = dict(model.named_modules()).get(path)
    if present is None:
        known = [name for name, _ in model.named_modules() if name]
        raise MergeError(
            f"merge: the model has no module {path!r}, which the adapter trained in full{closest(path, known)}. Load the base in "
            "the class that the adapter was trained on, or merge its folder (lorabank merge), which does so."
        )
    module = unwrapped(present)
    if why := unsavable(module, unloaded=unloaded):
        raise MergeError(f"merge: module {path!r} can't take the adapter's values: {why}")
    own = module.state_dict(keep_vars=True)
    if wrong := sorted(own.keys() ^ values.keys()):
        raise MergeError(f"merge: module {path!r}: the model or the adapter has no {wrong[0]!r}; it belongs to another base")
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        if own[key].shape != value.shape:
            raise MergeError(
                f"merge: module {path!r}: {key!r} is {tuple(value.shape)} in the adapter and {tuple(own[key].shape)} in the "
                f"model. {_way_out(path, module, value)}"
            )
        if isinstance(own[key], nn.Parameter) and not value.is_floating_point():
            raise MergeError(f"merge: module {path!r}: {key!r} is {value.dtype} in the adapter; expected floating point")
        if not value.isfinite().all():
            raise MergeError(f"merge: module {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
        if isinstance(own[key], nn.Parameter):
            found[key] = value
        elif unloaded:
            raise MergeError(
                f"merge: module {path!r}: {key!r} is no parameter, and isn't merged tensor by tensor. Load the model and use "
                "merge."
            )
        elif not torch.equal(value.to(own[key].device, own[key].dtype), own[key]):
            raise MergeError(f"merge: module {path!r}: {key!r} is no parameter, and the adapter's is another")
    return found


def _way_out(path: str, module: nn.Module, value: Tensor) -> str:
    """From another shape; a head of another size can be put into a model of one's own."""
    if type(module) is not nn.Linear or value.ndim != 2 or value.shape[1] != module.in_features:
        return RESIZE
    bias = "" if module.bias is not None else ", bias=False"
    made = f"torch.nn.Linear({module.in_features}, {len(value)}{bias})"
    return f"{RESIZE} A model of your own takes another head first: model.set_submodule({path!r}, {made})."


def _same(adapter: Adapter, name: str, value: Tensor) -> bool:
    """Whether the adapter has the parameter in full, too, with the same values."""
    for path, values in adapter.modules.items():
        other = values.get(name.removeprefix(f"{path}.")) if name.startswith(f"{path}.") else None
        if other is not None and other.shape == value.shape and torch.equal(other, value):
            return True
    return False
