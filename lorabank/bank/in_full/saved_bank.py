"""`SavedModules`: the part of a bank that holds modules trained in full, by path, each with the adapters' copies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Router
from lorabank.bank.in_full.heads import detector_heads, extra_outputs, label_layers
from lorabank.bank.in_full.saved import SavedModule
from lorabank.bank.in_full.saved_paths import unsavable
from lorabank.bank.init import normal
from lorabank.bank.owners import Owners
from lorabank.bank.places import places_of, rows_lost
from lorabank.bank.reach import ReachCheck
from lorabank.bank.wrappers import base_path, base_prefix
from lorabank.bank.wrapping import Adapted, unwrapped
from lorabank.errors import AdapterFileError, ConfigError, LorabankError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import SAVED_FLOATS

Values = Mapping[str, Mapping[str, Tensor]]
"""Module path → name in it → tensor."""


class SavedModules:
    """The wrapped modules of one bank, and which adapter has a copy of which."""

    def __init__(self, model: nn.Module, reach: ReachCheck, owners: Owners, head: str | None = None) -> None:
        self._model, self._reach, self._owners, self._head = model, reach, owners, head
        self.modules: dict[str, SavedModule] = {}
        self._of: dict[str, tuple[str, ...]] = {}

    def paths(self, name: str) -> tuple[str, ...]:
        """Paths of the modules that an adapter has a copy of."""
        return self._of.get(name, ())

    def leaves(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`<module path>.<parameter's name>` and the leaf, of one adapter."""
        for path in self.paths(name):
            for key, leaf in self.modules[path].slots[name].leaves.items():
                yield f"{path}.{key}", leaf

    def values(self, name: str) -> dict[str, dict[str, Tensor]]:
        """A copy of an adapter's modules, on the CPU, by their paths in the base."""
        prefix = base_prefix(self._model)
        return {base_path(path, prefix): self.modules[path].values(name) for path in self.paths(name)}

    def fresh(self, paths: Sequence[str], num_labels: int | None, seed: int) -> dict[str, dict[str, Tensor]]:
        """The base's own values; with `num_labels` the layer of labels is a new one with an output for each, random by `seed`.

        Raises ConfigError where no such layer is in these modules.
        """
        made: dict[str, dict[str, Tensor]] = {}
        for path in paths:
            made[path] = {key: p.detach() for key, p in unwrapped(self._model.get_submodule(path)).named_parameters()}
        if num_labels is None:
            return made
        owners = {
            layer: path for layer in label_layers(self._model, self._head) for path in paths if f"{layer}.".startswith(f"{path}.")
        }
        if not owners or type(num_labels) is not int or num_labels < 1:
            why = "expected a whole number ≥ 1" if owners else "the adapter saves no linear layer with an output a label"
            raise ConfigError(f"num_labels: {why}, got {num_labels!r}. It is for a classifier whose head is in modules_to_save.")
        spread = getattr(getattr(self._model, "config", None), "initializer_range", None)
        more = extra_outputs(self._model)
        finds = bool(detector_heads(self._model))
        for layer, owner in owners.items():
            for key in [key for key in made[owner] if key in _names_of(layer.removeprefix(owner).lstrip("."))]:
                old = made[owner][key]
                shape = (num_labels + more, *old.shape[1:])
                fresh = torch.zeros(shape) if old.ndim == 1 else normal(shape, spread or 0.02, seed, f"{owner}.{key}")
                made[owner][key] = _as_objects(fresh, old, more) if finds else fresh
        return made

    def install(self, name: str, values: Values, router: Router) -> None:
        """Give an adapter its copies, with these values; on any failure it has none. `router`: the bank, which isn't kept."""
        done: list[str] = []
        try:
            for path in values:
                module = self._wrap(path, router)
                module.add_slot(name, values[path])
                done.append(path)
        except BaseException:
            for path in done:
                self.modules[path].remove_slot(name)
            raise
        self._of[name] = tuple(values)

    def write(self, name: str, values: Values) -> None:
        """Copy values into an adapter's copies."""
        for path, mine in values.items():
            self.modules[path].write(name, mine)

    def remove(self, name: str) -> None:
        """Forget an adapter's copies."""
        for path in self._of.pop(name, ()):
            self.modules[path].remove_slot(name)

    def clear(self) -> None:
        """Forget everything: the bank ends."""
        self.modules.clear()
        self._of.clear()

    def _wrap(self, path: str, router: Router) -> SavedModule:
        if path not in self.modules:
            present = self._model.get_submodule(path)
            if isinstance(present, Adapted) or any(isinstance(module, Adapted) for module in present.modules()):
                raise LorabankError(
                    f"module {path!r} is, or holds, a layer that was wrapped for LoRA. Attach a new bank (bank.detach() first) "
                    "to train it in full."
                )
            labels = (layer for layer in label_layers(self._model, self._head) if f"{layer}.".startswith(f"{path}."))
            own = next((layer.removeprefix(path).lstrip(".") for layer in labels), None)
            wrapper = SavedModule(present, path, router, rows_lost(self._model, path), own)
            for parent, attribute in places_of(self._model, present):
                setattr(parent, attribute, wrapper)
            self.modules[path] = wrapper
            self._reach.watch(wrapper)
            self._owners.watch(wrapper)
        return self.modules[path]

    # ---- adapters from elsewhere ------------------------------------------------------------------------------------

    def fitting(self, name: str, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        """A loaded adapter's values by the paths in the model. Raises AdapterFileError where they aren't these modules'."""
        prefix = base_prefix(self._model)
        home = {base_path(path, prefix): path for path, _ in self._model.named_modules() if path}
        return {
            home.get(path, path): self._fitting(name, path, home.get(path), values) for path, values in adapter.modules.items()
        }

    def _fitting(self, name: str, path: str, here: str | None, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        way_out = "Load the model class that it was trained on, or fetch the file again."

        def refuse(why: str, way: str = way_out) -> AdapterFileError:
            return AdapterFileError(
                f"adapter {name!r} doesn't fit this model; nothing was loaded. Its module {path!r}, saved in full: {why}. {way}"
            )

        if here is None:
            known = [name for name, _ in self._model.named_modules() if name]
            raise refuse(f"the model has no such module{closest(path, known)}")
        module = unwrapped(self._model.get_submodule(here))
        if why := unsavable(module):
            raise refuse(why)
        own, parameters = module.state_dict(keep_vars=True), dict(module.named_parameters())
        if wrong := sorted(own.keys() ^ values.keys()):
            raise refuse(f"{wrong[0]!r} is {'not in the file' if wrong[0] in own else 'not in the model'}")
        labels = (layer for layer in label_layers(self._model, self._head) if f"{layer}.".startswith(f"{here}."))
        free = next((_names_of(layer.removeprefix(here).lstrip(".")) for layer in labels), ())
        for key, value in values.items():
            mine = own[key].detach()
            same = value.shape[1:] == mine.shape[1:] and value.ndim == mine.ndim if key in free else value.shape == mine.shape
            if not same:
                more = self._head is None and value.shape[1:] == mine.shape[1:]
                head = f" If it is the model's head, say so, and each adapter has its own: lorabank.attach(model, head={here!r})."
                shapes = f"{key!r} is {tuple(value.shape)}, the model has {tuple(mine.shape)}"
                raise refuse(shapes, way_out + (head if more else ""))
            if isinstance(own[key], nn.Parameter) and value.dtype not in SAVED_FLOATS:
                raise refuse(f"{key!r} is {value.dtype}; expected float32, bfloat16, float16 or float64")
            if not isinstance(own[key], nn.Parameter) and not torch.equal(value.to(mine.device, mine.dtype), mine):
                raise refuse(f"{key!r} is no parameter, so one for all adapters, and the file has another")
        if len({len(values[key]) for key in free if key in values}) > 1:
            shapes = " and ".join(f"{key!r} {tuple(values[key].shape)}" for key in free if key in values)
            raise refuse(f"{shapes} are of different numbers of labels; fetch it again")
        return {key: values[key] for key in parameters}


def _names_of(layer: str) -> Collection[str]:
    return [f"{layer}.{part}".lstrip(".") for part in ("weight", "bias")]


def _as_objects(fresh: Tensor, old: Tensor, more: int) -> Tensor:
    """A detector's new categories as the mean of those that it has, moved by `fresh`: it knows things from ground then.

    `more`: outputs beside the categories, "no object", which stay.
    """
    known = old.float().cpu()
    count = len(known) - more
    fresh[: len(fresh) - more] += known[:count].mean(0)
    fresh[len(fresh) - more :] = known[count:]
    return fresh
