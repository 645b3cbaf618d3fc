"""The parts of an image model in an adapter's paths: `unet.down_blocks.0…`, `text_encoder.encoder.layers.0…`.

The first part of a path is the component's name, as in an `nn.Module` that holds a pipeline's models under these names: an
adapter of several models is loaded into a bank of such a module. `of_component` makes one model's adapter out of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.extras import refuse_extras
from lorabank.formats.patterns import to_patterns

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
"""diffusers' names of the models that files hold layers of."""
TEXT_MODEL = "text_model."
"""What files, and older transformers, have before the path of a layer of CLIP's text model."""


def split(path: str) -> tuple[str, str]:
    """(component, path in it); the component is '' where the path begins with none."""
    first, _, rest = path.partition(".")
    return (first, rest) if first in COMPONENTS and rest else ("", path)


def components(paths: Collection[str]) -> list[str]:
    """Those that the paths are of, in the order of COMPONENTS."""
    found = {split(path)[0] for path in paths}
    return [name for name in ("", *COMPONENTS) if name in found]


def of_component(adapter: Adapter, name: str) -> Adapter:
    """The adapter of one model alone: its layers, by their paths in that model. Raises AdapterFileError where it has none."""
    refuse_extras(adapter, "an image model's part")
    layers = {split(path)[1]: layer for path, layer in adapter.layers.items() if split(path)[0] == name}
    if not layers:
        has = components(list(adapter.layers))
        raise AdapterFileError(
            f"component {name!r}: the adapter has no layers of it{closest(name, has)}. "
            f"It has {', '.join(filter(None, has)) or 'none but a model without components'}."
        )
    weights = {split(path)[1]: value for path, value in adapter.base_weights.items() if split(path)[0] == name}
    norms = {split(path)[1]: value for path, value in adapter.base_norms.items() if split(path)[0] == name}
    modules = {split(path)[1]: module for path, module in adapter.modules.items() if split(path)[0] == name}
    changes = {"layers": layers, "modules": modules, "base_weights": weights, "base_norms": norms}
    return replace(adapter, config=config_of(layers, adapter.config), fingerprint=None, **changes)


def as_component(adapter: Adapter, name: str) -> Adapter:
    """The adapter of one model as that of a component of a pipeline. Raises AdapterFileError for a name that diffusers hasn't."""
    if name not in COMPONENTS:
        raise AdapterFileError(f"component {name!r}: not known{closest(name, COMPONENTS)}; there are {', '.join(COMPONENTS)}")
    refuse_extras(adapter, "an image model's part")
    layers = {f"{name}.{path}": layer for path, layer in adapter.layers.items()}
    weights = {f"{name}.{path}": value for path, value in adapter.base_weights.items()}
    norms = {f"{name}.{path}": value for path, value in adapter.base_norms.items()}
    modules = {f"{name}.{path}": module for path, module in adapter.modules.items()}
    changes = {"layers": layers, "modules": modules, "base_weights": weights, "base_norms": norms}
    return replace(adapter, config=config_of(layers, adapter.config), fingerprint=None, **changes)


def in_model_names(path: str) -> str:
    """A file's path as transformers' models have it: `CLIPTextModel`, the first text encoder, holds its encoder itself."""
    prefix = f"text_encoder.{TEXT_MODEL}"
    return f"text_encoder.{path.removeprefix(prefix)}" if path.startswith(prefix) else path


def in_file_names(path: str) -> str:
    """A model's path as files have it, which any version of the tools reads."""
    prefix = "text_encoder.encoder.layers."
    return f"text_encoder.{TEXT_MODEL}{path.removeprefix('text_encoder.')}" if path.startswith(prefix) else path


def spelled_for(adapter: Adapter, paths: Collection[str]) -> Adapter:
    """The adapter with `text_model.` put in or left out where only that names a module of a model, whose paths are given.

    Which of the two a model has depends on its class and on transformers' version.
    """
    known, layers = set(paths), dict[str, AdapterLayer]()
    for path, layer in adapter.layers.items():
        component, rest = split(path)
        other = rest.removeprefix(TEXT_MODEL) if rest.startswith(TEXT_MODEL) else TEXT_MODEL + rest
        other = f"{component}.{other}" if component else other
        layers[other if path not in known and other in known else path] = layer
    if list(layers) == list(adapter.layers):
        return adapter
    refuse_extras(adapter, "an image model's part")
    return replace(adapter, config=config_of(layers, adapter.config), layers=layers)


def config_of(layers: Mapping[str, AdapterLayer], like: AdapterConfig | None = None) -> AdapterConfig:
    """A configuration that gives exactly these layers their ranks and scalings; `like` gives how they were trained."""
    rank, ranks = to_patterns({path: layer.rank for path, layer in layers.items()})
    alpha, alphas = to_patterns({path: alpha_of(layer) for path, layer in layers.items()})
    decomposed = any(layer.magnitude is not None for layer in layers.values())
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        targets=sorted(layers),
        use_dora=decomposed,
        dropout=like.dropout if like else 0.0,
        init=like.init if like else "uniform",
        modules_to_save=like.modules_to_save if like else None,
    )


def alpha_of(layer: AdapterLayer) -> float:
    """The α whose α/r is the layer's scaling exactly, or to the last bit where no number is; whole where it can be."""
    near = layer.scaling * layer.rank
    options = (float(round(near)), float(f"{near:.7g}"), float(f"{near:.12g}"), near)
    return min(options, key=lambda alpha: (abs(alpha / layer.rank - layer.scaling), options.index(alpha)))
