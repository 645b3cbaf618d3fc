"""The tensor names of PEFT's files: which layer and role a name stands for. A name that isn't understood is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats import dense
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.files import SAVED_FLOATS

PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<role>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<role>[AB])(?:\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<adapter>[^.]+))?(?:\.weight)?")
_BASE = re.compile(r"(?P<path>.+)\.base_layer\.weight")
UNSUPPORTED_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$"), "a bias on a LoRA matrix"),
    (re.compile(r"\.base_layer\.lora_[AB]"), "an adapter on stacked expert parameters, which target_parameters doesn't name,"),
    (re.compile(r"\.base_layer\.bias$"), "a trained bias"),
    (re.compile(r"\.(lora_(down|up|mid)|hada_\w+|lokr_\w+|dora_scale|alpha)\b"), "a kohya or LyCORIS tensor"),
    (re.compile(r"\.token_adapter\b|\.trainable_tokens"), "trained token embeddings"),
    (re.compile(r"\.lora_(?!A\b|B\b)\w+"), "a tensor of a LoRA variant"),
    (re.compile(r"\.(weight|bias)$"), "a module saved in full that modules_to_save doesn't name"),
)


def tensor_name(path: str, role: str, *, looks_up: bool = False) -> str:
    """PEFT's name for `A` or `B` of a layer; `looks_up`: of an embedding."""
    return f"{PREFIX}{path}.lora_embedding_{role}" if looks_up else f"{PREFIX}{path}.lora_{role}.weight"


def to_tensors(path: str, layer: AdapterLayer) -> dict[str, Tensor]:
    """A layer as PEFT's file has it.

    PEFT's A of a grouped convolution sees all channels, so ours stands in it once for each group, zero where that sees nothing.
    """
    A, B = dense.to_file(layer) if layer.dense else (layer.A, layer.B)
    if layer.A.ndim > 2:
        B = B.view(*B.shape, *(1,) * (A.ndim - 2))
    if layer.groups > 1 and not layer.dense:
        rank, width = A.shape[:2]
        wide = A.new_zeros(rank * layer.groups, width * layer.groups, *A.shape[2:])
        for i in range(layer.groups):
            wide[i * rank : (i + 1) * rank, i * width : (i + 1) * width] = A
        A = wide
    found = {tensor_name(path, role, looks_up=layer.looks_up): value for role, value in (("A", A), ("B", B))}
    if layer.magnitude is not None:
        found[magnitude_name(path)] = _as_peft_has_it(layer.magnitude, A.ndim)
    return found


def _as_peft_has_it(magnitude: Tensor, ndim: int) -> Tensor:
    return magnitude if ndim == 2 else magnitude.view(1, -1, *(1,) * (ndim - 2))


def file_rank(layer: AdapterLayer) -> int:
    """The rank that PEFT counts."""
    return dense.file_rank(layer) if layer.dense else layer.rank * layer.groups


def from_tensors(where: str, path: str, pair: tuple[Tensor, Tensor], scaling: float, *, looks_up: bool) -> AdapterLayer:
    """The layer that PEFT's A and B, whose shapes fit each other, stand for."""
    A, B = pair
    if A.ndim == 2:
        return AdapterLayer(A, B, scaling, looks_up=looks_up)
    groups = len(A) // B.shape[1]
    B = B.flatten(1)
    if groups == 1:
        return AdapterLayer(A, B, scaling)
    blocks = A.view(groups, len(A) // groups, groups, -1, *A.shape[2:])
    own = torch.stack([blocks[i, :, i] for i in range(groups)])
    if sum(int(block.count_nonzero()) for block in own) != int(A.count_nonzero()):
        return dense.from_file(A, B, scaling, groups)
    if all(torch.equal(block, own[0]) for block in own):
        return AdapterLayer(own[0].clone(), B, scaling, groups=groups)
    rank, out = B.shape[1], len(B) // groups
    wide = B.new_zeros(len(B), rank * groups)
    for i in range(groups):
        wide[i * out : (i + 1) * out, i * rank : (i + 1) * rank] = B[i * out : (i + 1) * out]
    return AdapterLayer(own.flatten(0, 1).clone(), wide, scaling, groups=groups)


def split_base_weights(where: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights of the base by module path, the other tensors): PEFT saves embeddings that carry an adapter along."""
    adapted = {_parse(where, name)[0] for name in tensors if not _BASE.fullmatch(name)}
    found, left = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in tensors.items():
        match = _BASE.fullmatch(name)
        path = None if match is None else bare_path(match["path"])
        if path in adapted:
            check_dtype(where, name, value)
            found[path] = value
        else:
            left[name] = value
    return found, left


def split_magnitudes(where: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(DoRA's magnitudes (out,) by module path, the other tensors). Raises AdapterFileError for two of one layer."""
    found, left = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in tensors.items():
        match = _MAGNITUDE.fullmatch(name)
        if match is None:
            left[name] = value
        else:
            path = bare_path(match["path"])
            if path in found:
                raise AdapterFileError(
                    f"{where}: {name!r} is a second magnitude of {path!r}: two adapters in a file. Save each by itself."
                )
            check_dtype(where, name, value)
            found[path] = value.reshape(-1)
    return found, left


def magnitude_name(path: str) -> str:
    """PEFT's name for DoRA's magnitudes of a layer."""
    return f"{PREFIX}{path}.lora_magnitude_vector"


def base_name(path: str) -> str:
    """PEFT's name for the base weight of an adapted layer."""
    return f"{PREFIX}{path}.base_layer.weight"


def pair_tensors(where: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Module path → (A, B, whether it is an embedding), sorted by path. Raises AdapterFileError for what doesn't fit."""
    found: dict[tuple[str, str], str] = {}
    adapters: set[str | None] = set()
    for name in tensors:
        path, role, adapter = _parse(where, name)
        adapters.add(adapter)
        if (path, role) in found:
            raise AdapterFileError(
                f"{where}: {name!r} and {found[path, role]!r} are one matrix of {path!r}: two adapters in a file. "
                "Save each by itself."
            )
        found[path, role] = name
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(name) for name in adapters))
        raise AdapterFileError(f"{where}: tensors of several adapters in one file ({names}). Save one adapter a folder.")
    if not found:
        raise AdapterFileError(f"{where}: holds no tensors. Fetch or save it again.")
    pairs: dict[str, tuple[Tensor, Tensor, bool]] = {}
    for path in sorted({path for path, _ in found}):
        for role, other in (("A", "B"), ("B", "A")):
            if (path, role) not in found:
                raise AdapterFileError(
                    f"{where}: layer {path!r} has {found[path, other]!r} and no lora_{role}: the file is incomplete. "
                    "Fetch or save it again."
                )
        names = found[path, "A"], found[path, "B"]
        kinds = [_EMBEDDING.fullmatch(name) is not None for name in names]
        if kinds[0] != kinds[1]:
            raise AdapterFileError(f"{where}: {names[0]!r} and {names[1]!r} are of two kinds of layer, and one path")
        pairs[path] = *_checked(where, names, tensors[names[0]], tensors[names[1]]), kinds[0]
    return pairs


def _parse(where: str, name: str) -> tuple[str, str, str | None]:
    match = _EMBEDDING.fullmatch(name) or _LORA.fullmatch(name)
    unsupported = next((kind for pattern, kind in UNSUPPORTED_KEYS if pattern.search(name)), None)
    if match is None or ".base_layer." in name:
        what = f"{unsupported}, which is not supported yet" if unsupported else "not a name that PEFT's LoRA writes"
        raise AdapterFileError(f"{where}: tensor {name!r} is {what}. Nothing is dropped in silence, so the file can't be loaded.")
    return bare_path(match["path"]), match["role"], match["adapter"]


def bare_path(path: str) -> str:
    """A module's path without what PEFT puts before it."""
    while path.startswith(PREFIX):  # files of a wrapped wrapper carry it twice
        path = path.removeprefix(PREFIX)
    return path


def check_dtype(where: str, name: str, value: Tensor) -> None:
    """Raise AdapterFileError for a tensor of another kind of number."""
    if value.dtype not in SAVED_FLOATS:
        raise AdapterFileError(f"{where}: tensor {name!r} is {value.dtype}; expected float32, bfloat16, float16 or float64")


def _checked(where: str, names: tuple[str, str], A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in zip(names, (A, B), strict=True):
        check_dtype(where, name, value)
        if not 2 <= value.ndim <= 5 or 0 in value.shape:
            raise AdapterFileError(
                f"{where}: tensor {name!r} is {tuple(value.shape)}; expected two dimensions above 0, or a convolution's"
            )
    if A.ndim != B.ndim or any(size != 1 for size in B.shape[2:]):
        raise AdapterFileError(
            f"{where}: {names[0]!r} {tuple(A.shape)} and {names[1]!r} {tuple(B.shape)} aren't one convolution's: its B is 1 × 1"
        )
    groups, left = divmod(A.shape[0], B.shape[1])
    grouped = A.ndim > 2 and groups > 0 and not left and A.shape[1] % groups == len(B) % groups == 0
    if A.shape[0] != B.shape[1] and not grouped:
        raise AdapterFileError(f"{where}: {names[0]!r} {tuple(A.shape)} and {names[1]!r} {tuple(B.shape)} are of different ranks")
    return A, B
