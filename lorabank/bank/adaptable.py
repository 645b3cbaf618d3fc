"""Which layers of a model can be adapted, and which that look alike can't, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lorabank.bank.kinds import CONV, layer_kind, own_way
from lorabank.bank.multihead import OUT, projections_of
from lorabank.bank.multihead import obstacle as attention_obstacle
from lorabank.bank.owners import BYPASSED, is_named
from lorabank.bank.stacked.stacks import is_registered, obstacle, stacks_of
from lorabank.bank.storages import linear4bit
from lorabank.bank.wrappers import BASE_LAYER, wraps_base_layer
from lorabank.bank.wrapping import Adapted, unwrapped


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
    for path, module in own_modules(model):
        layer = unwrapped(module)
        found |= {f"{path}.{name}".lstrip("."): projection for name, projection in projections_of(layer).items()}
        if path not in bypassed and path not in found and layer_kind(layer) is not None:
            found[path] = layer
        if not _in_wrapper(path):
            found |= {f"{path}.{name}".lstrip("."): stack for name, stack in stacks_of(layer).items()}
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of them that are linear over features."""
    return {path: layer for path, layer in adaptable_layers(model).items() if is_linear(layer)}


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer can be adapted, and is linear over features."""
    kind = layer_kind(layer)
    return kind is not None and kind.linear


def unsupported_linear_maps(model: nn.Module) -> dict[str, str]:
    """Linear maps that can't be adapted yet: path to the reason. `all-linear` refuses a model that has any."""
    modules = dict(model.named_modules())
    found = {path: why for path, why in _fused_away(model).items() if not isinstance(unwrapped(modules[path]), _NO_LINEAR_MAPS)}
    heads = output_head_paths(model)
    for path, module in own_modules(model):
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


def others_of_a_kind(model: nn.Module, kind: str) -> dict[str, str]:
    """Convolutions, or embeddings, that can't be adapted: path to the reason."""
    bypassed, found = _fused_away(model), dict[str, str]()
    classes = (nn.modules.conv._ConvNd,) if kind == CONV else (nn.Embedding, nn.EmbeddingBag)
    for path, module in own_modules(model):
        module = unwrapped(module)
        if isinstance(module, classes) and (path in bypassed or layer_kind(module) is None):
            named = f"a {type(module).__name__} isn't supported yet" if type(module).__module__.startswith("torch.") else ""
            found[path] = bypassed.get(path) or own_way(module) or named or f"{type(module).__name__} has a forward of its own"
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


def own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of the base model: not the children of our wrappers, nor what PEFT's hold beside their base layer."""
    modules, beside = list(model.named_modules()), list[str]()
    for path, module in modules:
        if isinstance(module, Adapted) or wraps_base_layer(module):
            own = module.base._modules if isinstance(module, Adapted) else (BASE_LAYER,)
            theirs = (child for child in module._modules if child not in own)
            beside += [f"{path}.{child}.".lstrip(".") for child in theirs]
    return ((path, module) for path, module in modules if not f"{path}.".startswith(tuple(beside)))


def _in_wrapper(path: str) -> bool:
    """Whether PEFT wraps a module: experts only where it adapts their parameters, which are no parameters in a call."""
    return path.rpartition(".")[2] == BASE_LAYER


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
