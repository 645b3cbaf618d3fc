"""PEFT's wrappers around a model and its layers: which modules they are, and what a base layer is called without them.

An adapter's paths are the base's own, so its file is the same whether or not another PEFT method was in the model.
"""

from __future__ import annotations

from torch import nn

BASE_LAYER = "base_layer"
"""What PEFT calls the layer inside a wrapper of its own."""
_LAYERS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")


def _is_pefts(module: nn.Module, *names: str) -> bool:
    return any(cls.__name__ in names and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def wraps_base_layer(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's wrappers, which hold a base layer and parts of a method beside it."""
    return _is_pefts(module, *_LAYERS)


def without_wrappers(path: str) -> str:
    """A path without PEFT's wrappers of layers: `….q_proj.base_layer` is `….q_proj`."""
    return ".".join(part for part in path.split(".") if part != BASE_LAYER) if BASE_LAYER in path else path


def base_prefix(model: nn.Module) -> str:
    """What PEFT puts before the base's own paths: nothing, `base_model.` or `base_model.model.`."""
    prefix = ""
    if _is_pefts(model, "PeftModel"):
        prefix, model = "base_model.", model._modules["base_model"] or model
    return f"{prefix}model." if _is_pefts(model, "BaseTuner") else prefix


def base_path(path: str, prefix: str) -> str:
    """The path, of a layer or a parameter, in the base itself. `prefix`: `base_prefix` of the model."""
    return without_wrappers(path.removeprefix(prefix))
