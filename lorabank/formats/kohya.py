"""kohya's files (sd-scripts, LyCORIS): the form that ComfyUI and A1111 load, both ways.

`<name>.lora_down.weight` is A, `.lora_up.weight` B, `.alpha` a scalar (absent: the rank), so that the scaling is α/r;
`.dora_scale` holds DoRA's magnitudes. LyCORIS' Tucker convolutions, LoHa and LoKr are read as LoRA. Names become module paths
by the model that is given, else by the table of `kohya_names`; one that neither has is an error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorabank.errors import AdapterFileError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import COMPONENTS, alpha_of, in_file_names, split
from lorabank.formats.extras import refuse_extras
from lorabank.formats.files import read_tensors, write_tensors
from lorabank.formats.fused import Whole, join, take_apart
from lorabank.formats.image_files import checked, file_metadata, held, with_file_metadata
from lorabank.formats.kohya_names import PREFIXES, Naming, Place, kernel_of, name_of, place
from lorabank.formats.lycoris_layers import KEYS as LYCORIS_KEYS
from lorabank.formats.lycoris_layers import Decomposed, decomposed, tucker_pair
from lorabank.formats.norms import warn_norms
from lorabank.formats.saved import refuse_modules
from lorabank.formats.slices import without_slices
from lorabank.wording import counted

NAMES = "kohya.names"
"""Key of the metadata that says how a file spelled its names, so that it is written the same way."""
PLAIN_KEYS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale")
OTHER_KEYS: Mapping[str, str] = {
    "diff": "a whole weight difference (LyCORIS full)",
    "diff_b": "a trained bias",
    "w_norm": "a trained normalisation layer",
    "b_norm": "a trained normalisation layer",
    "oft_blocks": "an orthogonal transformation (OFT)",
    "oft_diag": "an orthogonal transformation (OFT)",
    "on_input": "an (IA)³ vector",
    "a1.weight": "a GLoRA matrix",
    "lora_up.bias": "a bias on a LoRA matrix",
    "lora_down.bias": "a bias on a LoRA matrix",
    "scalar": "a factor of its own",
}
"""Tensors that can't be expressed as LoRA, by what follows the layer's name."""
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that is of the old file's bytes."""
OF_LYCORIS = ("ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha")
"""Metadata that isn't true of a layer once it is plain LoRA."""


@dataclass(frozen=True, kw_only=True)
class KohyaFile:
    """What a file holds, and what reading it took."""

    adapter: Adapter
    decomposed: Mapping[str, Decomposed] = field(default_factory=dict)
    """LoHa and LoKr layers by module path: the rank that they got, and its error."""
    resolved: str = ""
    """How the names were read: `table` or `model`."""


def load_kohya(path: str | Path, *, model: nn.Module | None = None, allow_non_finite: bool = False) -> Adapter:
    """Read one of kohya's files; LoHa and LoKr get the rank that loses nothing but rounding, and a warning says so.

    `model`: the one that it is for (its weights are not read: a model on the meta device will do), by whose modules names are
    resolved that the table doesn't have. A pipeline's models are children of one module, under their names.
    `allow_non_finite`: NaN and infinity are read too, to look at them. Raises AdapterFileError; nothing is read in part.
    """
    found = read_kohya(path, model=model, allow_non_finite=allow_non_finite)
    if found.decomposed:
        worst = max(found.decomposed.values(), key=lambda one: one.error)
        ranks = sorted(one.rank for one in found.decomposed.values())
        kinds = " and ".join(sorted({one.kind for one in found.decomposed.values()}))
        warnings.warn(
            f"{path}: {counted(len(found.decomposed), f'{kinds} layer')} became LoRA of rank {ranks[0]} to "
            f"{ranks[-1]} (relative error "
            f"{worst.error:.1g}). lorabank convert --rank gives smaller ones, and states the error.",
            stacklevel=2,
        )
    return found.adapter


def read_kohya(
    path: str | Path, *, model: nn.Module | None = None, rank: int | None = None, allow_non_finite: bool = False
) -> KohyaFile:
    """Read one of kohya's files. `rank`: the highest that LoHa and LoKr layers get; None for one that loses only rounding.

    Raises AdapterFileError that names the tensor and the way out; nothing is read in part.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    where = str(path)
    groups = _groups(where, checked(where, tensors, allow_non_finite=allow_non_finite))
    shapes = None if model is None else weight_shapes(model)
    if allow_non_finite:  # a layer that has to be decomposed first can't be looked at
        products = [name for name, group in groups.items() if not group.keys() <= set(PLAIN_KEYS)]
        checked(where, {key: value for key, value in tensors.items() if key.partition(".")[0] in products})
    places = _places(where, list(groups), shapes)
    small = _has_small_kernels(groups)
    layers, turned = dict[str, AdapterLayer](), dict[str, Decomposed]()
    for name, group in groups.items():
        here = places[name]
        kernel = _kernel(here.paths[0], shapes or {}, small)
        layer, how = _layer(where, name, group, rank, kernel)
        for module, part in take_apart(layer, here.paths, swapped=here.swapped).items():
            if module in layers:
                raise AdapterFileError(
                    f"{where}: {name!r} and another layer are both {module!r}: two adapters in one file. Save each by itself."
                )
            layers[module] = part
            if how:
                turned[module] = how
    layers = dict(sorted(layers.items()))
    warn_norms(where, layers)
    kept = with_file_metadata(where, metadata, layers, without=(*HASHES, *(OF_LYCORIS if turned else ())))
    naming = _naming(places, layers)
    more = {NAMES: str(naming)} if naming else {}
    adapter = Adapter(config=kept.config, layers=layers, metadata={**kept.metadata, **more}, **kept.about)
    return KohyaFile(adapter=adapter, decomposed=turned, resolved="table" if model is None else "model")


def save_kohya(adapter: Adapter, path: str | Path) -> Path:
    """Write `adapter` as one of kohya's files; equal adapters give equal bytes. Returns the path.

    Raises AdapterFileError, before anything is written, for what the form can't hold (`unheld` lists it); OutputError.
    """
    path, adapter = Path(path), without_slices(adapter)
    refuse_modules(adapter, f"{path}: kohya's form")
    refuse_extras(adapter, "kohya's form")
    problems = unheld(adapter)
    if problems:
        raise AdapterFileError(f"{path}: kohya's form can't hold {held(problems)}")
    naming = _naming_for(adapter)
    wholes: dict[str, tuple[Place, dict[str, AdapterLayer]]] = {}
    for module, layer in adapter.layers.items():
        found = name_of(module, naming)
        assert found is not None  # `unheld` named it
        # CLIP's text model is spelled in two ways, by the class that holds it
        own = {in_file_names(path): path for path in found[1].paths}[in_file_names(module)]
        wholes.setdefault(found[0], (found[1], {}))[1][own] = layer
    tensors: dict[str, Tensor] = {}
    for name, (here, parts) in wholes.items():
        tensors |= _tensors(name, join(Whole(paths=here.paths, swapped=here.swapped), parts))
    ranks = {layer.rank for layer in adapter.layers.values()}
    alphas = {alpha_of(layer) for layer in adapter.layers.values()}
    defaults = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    write_tensors(path, tensors, {**defaults, **file_metadata(adapter, own=(NAMES,))})
    return path


def unheld(adapter: Adapter) -> dict[str, str]:
    """Module path → why kohya's form can't hold that layer; empty where it can hold all."""
    naming, found = _naming_for(adapter), dict[str, str]()
    for path, layer in adapter.layers.items():
        name = name_of(path, naming)
        if name is None:
            component, _ = split(path)
            kinds = "U-Nets of SD 1.x, 2.x and SDXL, Flux, and their text encoders"
            what = f"kohya's name of it isn't known (known are {kinds})"
            found[path] = what if component else f"it belongs to no component ({', '.join(COMPONENTS[:4])}) of an image model"
        elif layer.looks_up:
            found[path] = "it is an embedding"
        elif layer.attention:
            found[path] = "it is nn.MultiheadAttention's, which nobody reads in that form"
        elif layer.groups > 1:
            found[path] = f"it is a convolution in {layer.groups} groups, which kohya's tools read in two ways"
        elif not (math.isfinite(layer.scaling) and layer.scaling > 0):
            found[path] = f"its scaling is {layer.scaling:g}, and α is above 0 there. Multiply B by it and use a scaling of 1"
        elif len(name[1].paths) > 1 and (why := _unfusable(name[1].paths, adapter.layers)):
            found[path] = why
    return found


def _unfusable(paths: Sequence[str], layers: Mapping[str, AdapterLayer]) -> str | None:
    """Why parts of one matrix can't be put together."""
    there = [layers[path] for path in paths if path in layers]
    decomposed_ = [layer.magnitude is not None for layer in there]
    if any(decomposed_) and (not all(decomposed_) or len(there) < len(paths)):
        return "it is decomposed (DoRA), and not all parts of the one matrix that they are in Flux are"
    return None


def _groups(where: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer name → its tensors by what follows the name. Raises AdapterFileError for a tensor that isn't understood."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(tensors.items()):
        name, _, role = key.partition(".")
        if role in OTHER_KEYS or role.startswith("bundle_emb") or name == "bundle_emb":
            what = OTHER_KEYS.get(role, "an embedding that came along")
            raise AdapterFileError(
                f"{where}: tensor {key!r} is {what}, which isn't LoRA and isn't supported; without it the adapter would compute "
                "something else. Merge it into its model with the tool that made it."
            )
        if role not in (*PLAIN_KEYS, *LYCORIS_KEYS):
            raise AdapterFileError(
                f"{where}: tensor {key!r} belongs to no layer in kohya's form{closest(role, (*PLAIN_KEYS, *LYCORIS_KEYS))}. "
                "Nothing is dropped in silence, so the file can't be loaded."
            )
        groups.setdefault(name, {})[role] = value
    if not groups:
        raise AdapterFileError(f"{where}: holds no tensors. Fetch or save it again.")
    return groups


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Module path → its weight's shape."""
    return {
        name.removesuffix(".weight"): tuple(value.shape) for name, value in model.named_parameters() if name.endswith(".weight")
    }


def _kernel(path: str, shapes: Mapping[str, tuple[int, ...]], small: bool) -> tuple[int, ...]:
    """Kernel of the layer at `path`: by the model, by the path, or, where SD 1.x and later differ, by what the file is of."""
    if path in shapes:
        return shapes[path][2:]
    by_name = kernel_of(path)
    return by_name if by_name is not None else (1, 1) if small else ()


def _places(where: str, names: Sequence[str], model_paths: Collection[str] | None) -> dict[str, Place]:
    by_model = _by_model(model_paths or ())
    found, unknown = dict[str, Place](), list[str]()
    for name in names:
        here = by_model.get(name) or place(name)
        if here is not None and model_paths is not None and name not in by_model:
            here = _in_model(here, model_paths)
        if here is None:
            unknown.append(name)
        else:
            found[name] = here
    if not unknown:
        return found
    lost = sorted({prefix for name in unknown for prefix in PREFIXES if name.startswith(prefix)})
    if model_paths is not None:
        parts = {path.partition(".")[0] for path in model_paths}
        texts = [prefix for prefix in lost if prefix.startswith("lora_te")]
        if texts and not any(part.startswith("text_encoder") for part in parts):
            raise AdapterFileError(
                f"{where}: {len(unknown)} of {len(names)} layers ({unknown[0]!r}, …) are of a text encoder, which the model "
                "lacks. Give the whole pipeline, or read the file without a model and take one part of it: "
                "of_component(Adapter.load(path), 'unet'), or lorabank convert --component unet."
            )
        raise AdapterFileError(
            f"{where}: the model has no layer {unknown[0]!r}{closest(unknown[0], by_model)}"
            + (f", nor {len(unknown) - 1} more of {len(names)}" if len(unknown) > 1 else "")
            + ". Give the model that it was trained on."
        )
    raise AdapterFileError(
        f"{where}: which module {unknown[0]!r} is can't be told from its name alone"
        + (f", nor {len(unknown) - 1} more of {len(names)}" if len(unknown) > 1 else "")
        + ". Without a model, names of SD 1.x, 2.x, SDXL and Flux are known; give the model: lorabank convert --model, or "
        "load_kohya(path, model=...)."
    )


def _in_model(here: Place, paths: Collection[str]) -> Place | None:
    """A place of the table in a model, whose paths may lack the component where it is that component itself."""
    if any(path in paths for path in here.paths):
        return here
    bare = replace(here, paths=tuple(split(path)[1] for path in here.paths))
    return bare if any(path in paths for path in bare.paths) else None


def _by_model(paths: Collection[str]) -> dict[str, Place]:
    """Names that a model's modules give: with kohya's prefix of their component, or any prefix where there is none.

    A name that two modules would give stands for neither.
    """
    short = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    found: dict[str, str | None] = {}
    for path in paths:
        component, rest = split(path)
        prefixes = (short[component],) if component in short else PREFIXES
        if component == "text_encoder":
            prefixes = ("lora_te_", "lora_te1_")
        for prefix in prefixes:
            flat = rest.replace(".", "_")
            spelled = {flat, f"text_model_{flat}"} if component == "text_encoder" else {flat}
            for name in (prefix + one for one in spelled):
                found[name] = None if found.get(name, path) != path else path
    return {name: Place(paths=(path,), style="model") for name, path in found.items() if path is not None}


def _layer(
    where: str, name: str, tensors: Mapping[str, Tensor], rank: int | None, kernel: tuple[int, ...]
) -> tuple[AdapterLayer, Decomposed | None]:
    magnitude = tensors.get("dora_scale")
    alpha = _alpha(where, name, tensors.get("alpha"))
    if any(key in tensors for key in LYCORIS_KEYS):
        if mixed := sorted(set(tensors) & set(PLAIN_KEYS[:3])):
            raise AdapterFileError(
                f"{where}: layer {name!r} is LyCORIS' and has {mixed[0]!r} too: two adapters in one file. Save each by itself."
            )
        layer, how = decomposed(where, name, tensors, alpha, rank=rank, kernel=kernel)
    else:
        layer, how = _plain(where, name, tensors, alpha), None
    if magnitude is None:
        return layer, how
    magnitude = _magnitude(where, name, magnitude, layer)
    return AdapterLayer(layer.A, layer.B, layer.scaling, magnitude=magnitude), how


def _plain(where: str, name: str, tensors: Mapping[str, Tensor], alpha: float | None) -> AdapterLayer:
    for role, other in (("down", "up"), ("up", "down")):
        if f"lora_{role}.weight" not in tensors:
            has = ", ".join(repr(f"{name}.{key}") for key in tensors)
            missing = f"no lora_{role}.weight" if f"lora_{other}.weight" in tensors else "neither lora_down nor lora_up"
            raise AdapterFileError(f"{where}: layer {name!r} has {has} and {missing}: the file is incomplete. Fetch it again.")
    down, up, mid = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("lora_mid.weight")
    if mid is not None:
        A, B = tucker_pair(where, name, up, mid, down)
    else:
        A, B = down, up.flatten(1) if up.ndim > 1 else up
    shapes = f"lora_down {tuple(down.shape)}, lora_up {tuple(up.shape)}"
    fit = 2 <= A.ndim <= 5 and B.ndim == 2 and B.shape[1] == A.shape[0] and all(n == 1 for n in up.shape[2:])
    if not fit or 0 in (*A.shape, *B.shape):
        raise AdapterFileError(
            f"{where}: layer {name!r} isn't A (rank, in …) and B (out, rank) of one rank: {shapes}. Fetch the file again."
        )
    return AdapterLayer(A, B, 1.0 if alpha is None else alpha / A.shape[0])


def _alpha(where: str, name: str, value: Tensor | None) -> float | None:
    if value is None:
        return None
    if value.numel() != 1:
        raise AdapterFileError(f"{where}: '{name}.alpha' should be one number, got {tuple(value.shape)}. Fetch the file again.")
    alpha = float(value)
    if alpha <= 0:
        raise AdapterFileError(
            f"{where}: '{name}.alpha' is {alpha:g}; expected a number above 0. The layer would change nothing, or the opposite; "
            "fetch the file again."
        )
    return alpha


def _magnitude(where: str, name: str, value: Tensor, layer: AdapterLayer) -> Tensor:
    """DoRA's magnitudes (out,) of a `dora_scale`, (out, 1, …). LyCORIS' older (1, in, …) scales inputs, which ours can't."""
    width, height = layer.A.shape[1], len(layer.B)
    if value.shape[:1] == (height,) and value.numel() == height:
        return value.flatten()
    if value.shape[:2] == (1, width) and value.numel() == width:
        raise AdapterFileError(
            f"{where}: '{name}.dora_scale' {tuple(value.shape)} has a magnitude for each input (LyCORIS' wd_on_output=False); "
            f"DoRA here, in PEFT and in the paper has one for each output, ({height}, 1). Merge it with the tool that made it."
        )
    raise AdapterFileError(
        f"{where}: '{name}.dora_scale' {tuple(value.shape)} should be one number for each of {height} outputs. Fetch "
        "the file again."
    )


def _has_small_kernels(groups: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a file is of SD 1.x, whose `proj_in` are 1 × 1 convolutions: its text has 768 channels."""
    widths = [
        tensors[key].shape[-1:]
        for name, tensors in groups.items()
        if name.endswith("attn2_to_k")
        for key in ("lora_down.weight", "hada_w1_b")
        if key in tensors
    ]
    return bool(widths) and widths[0] == (768,)


def _naming(places: Mapping[str, Place], layers: Mapping[str, AdapterLayer]) -> Naming | None:
    """The naming that gives exactly these names back, if one does."""
    text = "te1" if any(name.startswith("lora_te1_") for name in places) else "te"
    unet = "sgm" if any(here.style == "sgm" for here in places.values()) else "diffusers"
    naming = Naming(unet=unet, text=text)
    given = {found[0] for path in layers if (found := name_of(path, naming))}
    return naming if given == set(places) else None


def _naming_for(adapter: Adapter) -> Naming:
    return Naming.read(adapter.metadata.get(NAMES, "")) or Naming.of(list(adapter.layers))


def _tensors(name: str, layer: AdapterLayer) -> dict[str, Tensor]:
    ones = (1,) * (layer.A.ndim - 2)
    alpha = alpha_of(layer)
    exact = float(torch.tensor(alpha, dtype=torch.float32)) == alpha
    found = {
        f"{name}.lora_down.weight": layer.A,
        f"{name}.lora_up.weight": layer.B.reshape(*layer.B.shape, *ones),
        f"{name}.alpha": torch.tensor(alpha, dtype=torch.float32 if exact else torch.float64),
    }
    if layer.magnitude is not None:
        found[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, 1, *ones)
    return found
