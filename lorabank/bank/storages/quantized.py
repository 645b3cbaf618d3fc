"""`quantize_base`: a base model's linear layers kept in fp8 or 4 bits, in place. Adapters train over them as over any other."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import linear_layers, output_head_paths
from lorabank.bank.kinds import layer_kind
from lorabank.bank.multihead import Projection
from lorabank.bank.places import places_of
from lorabank.bank.reach import is_attached
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.storages.fp8_linear import EmulatedFp8Linear, Fp8Linear
from lorabank.bank.wrapping import Adapted
from lorabank.errors import ConfigError, LorabankError, MissingExtraError, closest
from lorabank.kernels import fp8
from lorabank.notices import warn_once

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class QuantizedBase:
    """What `quantize_base` did."""

    storage: str
    layers: tuple[str, ...]
    """Paths of the layers that it quantised; none where this GPU can't multiply in `storage`."""
    kept: Mapping[str, str]
    """Linear layers that stay as they were, the output head aside: path to the reason."""

    def __str__(self) -> str:
        kept = f", {len(self.kept)} kept as they were" if self.kept else ""
        return f"{len(self.layers)} linear layers in {self.storage}{kept}"


def quantize_base(
    model: nn.Module,
    storage: str,
    *,
    device: torch.device | str | None = None,
    emulate: bool = False,
    say: Say | None = None,
) -> QuantizedBase:
    """Keep every linear layer of `model` but the output head in `storage` (`fp8`, `nf4`) from now on, in place.

    Call it before `attach`. Each layer's old weight is freed as soon as the new one stands. `device`: where the quantised layers
    go, one at a time, so that the whole model never has to fit there unquantised; None leaves each where it is. `say` gets a
    sentence for whatever stays unquantised, or is slow; without it that is a warning, once.
    fp8: y = W x and dx = Wᵀ dy in e4m3, two bytes a weight, for speed; a GPU without fp8 leaves the model as it is.
    nf4: half a byte a weight with double quantisation, as QLoRA has it (arXiv:2305.14314), through bitsandbytes, for memory.
    emulate: fp8 with the arithmetic of fp8 units in plain torch (inputs and gradients rounded row by row too), on any device:
    slow, for measuring on a CPU what training on such a GPU would give.
    Raises ConfigError for another storage or a model without linear layers, MissingExtraError without bitsandbytes,
    LorabankError for an attached model.
    """
    if storage not in STORAGES:
        known = ", ".join(STORAGES)
        raise ConfigError(f"base_dtype: can't quantise to {storage!r}{closest(storage, STORAGES)}. There are: {known}.")
    if emulate and storage != "fp8":
        raise ConfigError(f"quantize_base: emulate is for fp8, whose units round the inputs; {storage} needs none. Leave it out.")
    if is_attached(model) or any(isinstance(module, Adapted) for module in model.modules()):
        raise LorabankError("quantize_base: this model has a bank. Detach it first (bank.detach()), quantise, then attach again.")
    say = say or warn_once
    kept = _kept(model, storage)
    paths = [path for path in _candidates(model) if path not in kept]
    if not paths and not kept:
        have = storage_of(model)
        raise ConfigError(
            f"base_dtype: {type(model).__name__} has no linear layer to keep in {storage}"
            + (f": it is in {have} already." if have else ". Leave base_dtype out.")
        )
    where = None if device is None else torch.device(device)
    present = linear_layers(model)[[*paths, *kept][0]].get_parameter("weight").device
    make = EmulatedFp8Linear if emulate else STORAGES[storage](where or present, say)
    if make is None:
        return QuantizedBase(storage=storage, layers=(), kept=dict.fromkeys(paths, "this GPU has no fp8 products") | kept)
    for path in paths:
        _replace(model, path, make, where)
    if kept:
        reasons = ", ".join(f"{count} because {reason}" for reason, count in Counter(kept.values()).items())
        say(f"{len(kept)} linear layers are not kept in {storage}: {reasons} ({next(iter(kept))} for one)")
    return QuantizedBase(storage=storage, layers=tuple(paths), kept=kept)


_Make = Callable[[Tensor, nn.Parameter | None], nn.Module]
"""(weight (O, I) on its device, bias) → the layer that holds it quantised."""


def _candidates(model: nn.Module) -> list[str]:
    """Paths of the linear layers that aren't quantised yet, the output head aside."""
    heads = output_head_paths(model)
    kinds = {path: layer_kind(layer) for path, layer in linear_layers(model).items() if path not in heads}
    return [path for path, kind in kinds.items() if kind is not None and not kind.quantized]


def _kept(model: nn.Module, storage: str) -> dict[str, str]:
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found, layers = dict[str, str](), linear_layers(model)
    for path in _candidates(model):
        layer = layers[path]
        weight = layer.get_parameter("weight")
        if weight.is_meta:
            raise LorabankError(f"quantize_base: {path}.weight is on the meta device: load the model first")
        if isinstance(layer, ExpertStack):
            found[path] = "they are stacked experts, which stay in the model's dtype"
        elif isinstance(layer, Projection):
            found[path] = "nn.MultiheadAttention reads their weight itself"
        elif users[id(weight)] > places[id(layer)]:
            found[path] = "their weight is shared with another layer"
        elif layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            found[path] = "they carry hooks"
        elif storage == "fp8" and any(size % fp8.MULTIPLE for size in weight.shape):
            found[path] = f"their sizes aren't multiples of {fp8.MULTIPLE}"
        elif storage == "nf4" and weight.numel() % 2:
            found[path] = "they have an odd number of weights"
    return found


def _replace(model: nn.Module, path: str, make: _Make, device: torch.device | None) -> None:
    old = model.get_submodule(path)
    if not path:
        raise LorabankError("quantize_base: the model itself is one linear layer; put it into an nn.Sequential")
    kind = layer_kind(old)
    assert kind is not None  # a candidate has one
    weight_OI, bias = kind.weight_oi(old._parameters, None), old._parameters["bias"]
    if bias is not None:
        bias = nn.Parameter(bias.detach().to(device or bias.device), requires_grad=False)
    new = make(weight_OI.to(device or weight_OI.device), bias)
    new.train(old.training)
    for parent, attribute in places_of(model, old):
        setattr(parent, attribute, new)


def _fp8(device: torch.device, say: Say) -> _Make | None:
    why = fp8.missing(device)
    if why is not None and device.type == "cuda":
        say(f"base_dtype fp8: no fp8 products on this GPU ({why}): the base stays as it is. nf4 saves memory here.")
        return None
    if why is not None:
        say(f"base_dtype fp8: no fp8 products here ({why}): each product dequantises its weight, slower than bf16 or fp32")
    return Fp8Linear


def _nf4(device: torch.device, say: Say) -> _Make:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "base_dtype nf4: needs 'bitsandbytes', which isn't installed: pip install 'lorabank[nf4]', or use fp8 or bf16."
        )
    library: Any = importlib.import_module("bitsandbytes.nn")

    def make(weight_OI: Tensor, bias: nn.Parameter | None) -> nn.Module:
        n_out, n_in = weight_OI.shape
        layer = library.Linear4bit(n_in, n_out, bias=False, compute_dtype=weight_OI.dtype, quant_type="nf4", device="meta")
        # factors in 8 bits in their turn: 0.4 bits a weight less, for two small kernels more before each product
        weight = library.Params4bit(
            weight_OI.detach().contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
        layer.weight = weight.to(weight_OI.device)
        layer.register_parameter("bias", bias)
        layer.support_avx512bf16_for_cpu = False  # its form for inference on a CPU rounds the factors
        return layer

    return make


STORAGES: Mapping[str, Callable[[torch.device, Say], _Make | None]] = {"fp8": _fp8, "nf4": _nf4}
"""Name → (device, say) → what makes a layer of it; None where the model is to stay as it is."""


def quantized_layers(model: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    """The layers whose weight is stored in fewer than 16 bits, and how it is; wrapped ones count as their base."""
    for module in model.modules():
        layer = module.base if isinstance(module, Adapted) else module
        kind = layer_kind(layer)
        if kind is not None and kind.quantized:
            yield layer, kind.storage


def storage_of(model: nn.Module) -> str | None:
    """`fp8`, `nf4` or `fp4` for a model with layers in it; None for one without."""
    return next((storage for _, storage in quantized_layers(model)), None)


def count_parameters(model: nn.Module, counted: Iterable[nn.Parameter]) -> int:
    """Numbers that `counted` stand for: a quantised weight counts as the weight that it is in place of."""
    held: set[int] = set()
    total = 0
    for layer, _ in quantized_layers(model):
        own = {id(p) for p in layer._parameters.values() if p is not None}
        if not own & held:
            size: Any = layer
            total += size.in_features * size.out_features + (0 if size.bias is None else size.bias.numel())
        held |= own
    return total + sum(p.numel() for p in {id(p): p for p in counted}.values() if id(p) not in held)
