"""`Wrapped`: the modules of a model that one bank has wrapped, and the places in them that adapters change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lorabank.bank.attention import LoRAMultihead
from lorabank.bank.carrier import Carrier, Router
from lorabank.bank.extra.biased import BiasedModule
from lorabank.bank.kinds import layer_kind
from lorabank.bank.layers import LoRALayer
from lorabank.bank.multihead import Projection
from lorabank.bank.owners import Owners
from lorabank.bank.places import beside_turned, places_of, rows_lost
from lorabank.bank.reach import ReachCheck
from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.experts import LoRAExperts
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.wrapping import Adapted
from lorabank.errors import LorabankError, TargetError


class Wrapped:
    """Wraps what an adapter needs when one first does, and takes every wrapper out again."""

    def __init__(self, model: nn.Module, reach: ReachCheck, owners: Owners) -> None:
        self._model, self._reach, self._owners = model, reach, owners
        self.layers: dict[str, Carrier] = {}
        """The places by path."""
        self.wrappers: list[Adapted] = []

    def wrap(self, path: str, layer: nn.Module, router: Router) -> Carrier:
        """The place for a layer, a slice or a stack; its module is wrapped where it isn't yet.

        `router`: the bank. It isn't kept here: a bank that nobody holds is gone at once, as nothing that it holds has it.
        """
        if isinstance(layer, FusedSlice):
            return self._wrap_slice(path, layer, router)
        if path not in self.layers:
            stacked = isinstance(layer, ExpertStack)
            where = path.rpartition(".")[0] if stacked or isinstance(layer, Projection) else path
            if not where:
                what = "an nn.MultiheadAttention" if isinstance(layer, Projection) else "one linear layer"
                raise TargetError(
                    f"the model itself is {what}, so there is no place to wrap it: put it into an nn.Sequential "
                    "or a module of yours"
                )
            present = self._model.get_submodule(where)
            if isinstance(present, Adapted):
                raise LorabankError(f"layer {path!r} is wrapped by another bank; detach that one first")
            if stacked:
                wrapper = LoRAExperts(present, where, router)
                places: Sequence[Carrier] = list(wrapper.carriers.values())
            elif isinstance(layer, Projection):
                wrapper = LoRAMultihead(present, where, router, rows_lost(self._model, where))
                places = list(wrapper.carriers.values())
            else:
                where_lost = rows_lost(self._model, where)
                if layer_kind(present) is not None:
                    turned = beside_turned(self._model, where)
                    wrapper = LoRALayer(present, where, router, where_lost, beside_turned=turned)
                else:
                    wrapper = BiasedModule(present, where, router, where_lost)
                places = [wrapper]
            for parent, attribute in places_of(self._model, present):
                setattr(parent, attribute, wrapper)
            self.wrappers.append(wrapper)
            for place in places:
                self.layers[place.path] = place
                self._reach.watch(place)
            for place in places:
                if isinstance(place, LoRALayer | BiasedModule):
                    self._owners.watch(place)
            if isinstance(wrapper, LoRAExperts) and "." in where:
                wrapper.watch(self._owners.above(where))
        return self.layers[path]

    def _wrap_slice(self, path: str, part: FusedSlice, router: Router) -> Carrier:
        parent, _, name = path.rpartition(".")
        whole = self.wrap(parent, part.layer, router)
        assert isinstance(whole, LoRALayer)
        place = whole.slice(name, part.outputs)
        if place.outputs != part.outputs:
            raise LorabankError(f"layer {path!r}: another adapter of this bank has other outputs there; name the slice otherwise")
        if path not in self.layers:
            self.layers[path] = place
            self._reach.watch(place)
        return place

    def take_out(self, others: Iterable[Adapted]) -> None:
        """Put the base's modules back where they stood, those of `others` too."""
        for wrapper in (*self.wrappers, *others):
            wrapper.bring_home()
            wrapper.base.training = wrapper.training  # its modules are the wrapper's, too
            for parent, attribute in places_of(self._model, wrapper):
                setattr(parent, attribute, wrapper.base)
        self.layers.clear()
        self.wrappers.clear()
