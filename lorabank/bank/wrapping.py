"""`Adapted`: wraps a base module where it stands in the model. It is never a subclass of it.

The wrapper shares the base module's own dictionaries of parameters and buffers, so paths, `state_dict`, `.to()` and code that
reads `layer.weight` see the base model unchanged. The slots' leaf parameters hang under the child `lora`, which trainers find
through `named_parameters()` and which writes nothing into a `state_dict`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorabank.bank.carrier import SlotParameters
from lorabank.bank.inert import nothing
from lorabank.bank.storage import RankStore
from lorabank.errors import LorabankError


class Adapted(nn.Module):
    """A base module with the bank's slots beside it."""

    def __init__(self, base: nn.Module, path: str, stores: Mapping[str, RankStore]) -> None:
        super().__init__()
        own = self.__dict__
        own["base"], own["path"] = base, path
        own["_parameters"], own["_buffers"] = base._parameters, base._buffers
        own["_modules"] = {"lora": SlotParameters(stores), **base._modules}
        # a hook, even an empty one, keeps nn.TransformerEncoderLayer off its fast path, which would read the weight past us
        self.register_forward_hook(nothing)
        self.train(base.training)

    base: nn.Module
    path: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)  # in_features and whatever else a model asks its layer for

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.base, memo)  # a copy of an attached model is the plain base: routes belong to the original

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self.base),), self.base.__getstate__()  # and so is a pickled one

    def bring_home(self) -> None:
        """Leave the base's weights as they were found."""

    @property
    def _slot_parameters(self) -> SlotParameters:
        child = self._modules["lora"]
        assert isinstance(child, SlotParameters)
        return child

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base._load_from_state_dict(*args, **kwargs)


def unwrapped(module: nn.Module) -> nn.Module:
    """A base module, whether it is wrapped or not."""
    return module.base if isinstance(module, Adapted) else module


def check_loaded(path: str, weight: torch.Tensor) -> None:
    """Raise LorabankError for a weight that isn't there to be wrapped."""
    if weight.is_meta:
        raise LorabankError(
            f"layer {path!r}: its weight is on the meta device: not loaded yet, or offloaded to CPU or disk. Load the model "
            "onto a device first; offloaded layers can't be adapted yet."
        )
