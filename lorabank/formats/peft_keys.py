"""The tensor names of PEFT's files: which layer and role a name stands for. A name that isn't understood is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.files import SAVED_FLOATS

PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<role>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
UNSUPPORTED_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.lora_embedding_[AB]"), "an adapted embedding"),
    (re.compile(r"\.lora_magnitude_vector"), "a DoRA magnitude"),
    (re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$"), "a bias on a LoRA matrix"),
    (re.compile(r"\.base_layer\.lora_[AB]"), "an adapter on stacked expert parameters"),
    (re.compile(r"\.base_layer\.bias$"), "a trained bias"),
    (re.compile(r"\.(lora_(down|up|mid)|hada_\w+|lokr_\w+|dora_scale|alpha)\b"), "a kohya or LyCORIS tensor"),
    (re.compile(r"\.token_adapter\b|\.trainable_tokens"), "trained token embeddings"),
    (re.compile(r"\.lora_(?!A\b|B\b)\w+"), "a tensor of a LoRA variant"),
    (re.compile(r"\.(weight|bias)$"), "a module saved in full (modules_to_save)"),
)


def tensor_name(path: str, role: str) -> str:
    """PEFT's name for `A` or `B` of a layer."""
    return f"{PREFIX}{path}.lora_{role}.weight"


def pair_tensors(where: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → (A, B), sorted by path. Raises AdapterFileError for a name, a pair or a shape that doesn't fit."""
    found: dict[tuple[str, str], str] = {}
    adapters: set[str | None] = set()
    for name in tensors:
        path, role, adapter = _parse(where, name)
        adapters.add(adapter)
        if (path, role) in found:
            raise AdapterFileError(
                f"{where}: {name!r} and {found[path, role]!r} are one matrix of {path!r}: two adapters in a file"
            )
        found[path, role] = name
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(name) for name in adapters))
        raise AdapterFileError(f"{where}: tensors of several adapters in one file ({names}). Save one adapter a folder.")
    if not found:
        raise AdapterFileError(f"{where}: holds no tensors")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path in sorted({path for path, _ in found}):
        for role, other in (("A", "B"), ("B", "A")):
            if (path, role) not in found:
                raise AdapterFileError(
                    f"{where}: layer {path!r} has {found[path, other]!r} and no lora_{role}: the file is incomplete"
                )
        names = found[path, "A"], found[path, "B"]
        pairs[path] = _checked(where, names, tensors[names[0]], tensors[names[1]])
    return pairs


def _parse(where: str, name: str) -> tuple[str, str, str | None]:
    match = _LORA.fullmatch(name)
    unsupported = next((kind for pattern, kind in UNSUPPORTED_KEYS if pattern.search(name)), None)
    if match is None or ".base_layer." in name:
        what = f"{unsupported}, which is not supported yet" if unsupported else "not a name that PEFT's LoRA writes"
        raise AdapterFileError(f"{where}: tensor {name!r} is {what}. Nothing is dropped in silence, so the file can't be loaded.")
    path = match["path"]
    while path.startswith(PREFIX):  # files of a wrapped wrapper carry it twice
        path = path.removeprefix(PREFIX)
    return path, match["role"], match["adapter"]


def _checked(where: str, names: tuple[str, str], A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in zip(names, (A, B), strict=True):
        if value.dtype not in SAVED_FLOATS:
            raise AdapterFileError(f"{where}: tensor {name!r} is {value.dtype}; expected float32, bfloat16, float16 or float64")
        if value.ndim in (3, 4, 5):
            raise AdapterFileError(
                f"{where}: tensor {name!r} is {tuple(value.shape)}: adapted convolutions are not supported yet"
            )
        if value.ndim != 2 or 0 in value.shape:
            raise AdapterFileError(f"{where}: tensor {name!r} is {tuple(value.shape)}; expected two dimensions above 0")
    if A.shape[0] != B.shape[1]:
        raise AdapterFileError(f"{where}: {names[0]!r} {tuple(A.shape)} and {names[1]!r} {tuple(B.shape)} are of different ranks")
    return A, B
