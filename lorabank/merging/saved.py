"""Modules that an adapter trained in full, merged: the model takes the adapter's values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorabank.bank.saved_paths import unsavable
from lorabank.bank.wrapping import unwrapped
from lorabank.errors import MergeError, closest
from lorabank.formats.adapter import Adapter


def fitting_modules(model: nn.Module, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each parameter in the adapter's modules → (the model's own, the adapter's values), all checked.

    Raises MergeError for a module that the model lacks or has in another shape, or whose parameter is another's, too.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    users: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), []).append(name)
    for path, values in adapter.modules.items():
        present = dict(model.named_modules()).get(path)
        if present is None:
            known = [name for name, _ in model.named_modules() if name]
            raise MergeError(f"merge: the model has no module {path!r}, which the adapter trained in full{closest(path, known)}")
        module = unwrapped(present)
        if why := unsavable(module):
            raise MergeError(f"merge: module {path!r} can't take the adapter's values: {why}")
        own = module.state_dict(keep_vars=True)
        if wrong := sorted(own.keys() ^ values.keys()):
            raise MergeError(f"merge: module {path!r}: the model or the adapter has no {wrong[0]!r}; it belongs to another base")
        for key, value in values.items():
            if own[key].shape != value.shape:
                raise MergeError(
                    f"merge: module {path!r}: {key!r} is {tuple(value.shape)} in the adapter and {tuple(own[key].shape)} in the "
                    "model. Load the base with as many labels."
                )
            if isinstance(own[key], nn.Parameter) and not value.is_floating_point():
                raise MergeError(f"merge: module {path!r}: {key!r} is {value.dtype} in the adapter; expected floating point")
            if not value.isfinite().all():
                raise MergeError(f"merge: module {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
            if not isinstance(own[key], nn.Parameter):
                if not torch.equal(value.to(own[key].device, own[key].dtype), own[key]):
                    raise MergeError(f"merge: module {path!r}: {key!r} is no parameter, and the adapter's is another")
                continue
            if others := [name for name in users.get(id(own[key]), ()) if not name.startswith(f"{path}.")]:
                raise MergeError(
                    f"merge: {path}.{key} is tied to {', '.join(others)}: merging would change both, the adapter changes one. "
                    "Untie the weights first (a model saved with tie_word_embeddings=false), or serve the adapter unmerged."
                )
            found[f"{path}.{key}"] = own[key], value
    return found
