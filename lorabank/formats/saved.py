"""Modules that were trained in full (`modules_to_save`) in PEFT's files: plain tensors under the module's path."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import SAVED_FLOATS
from lorabank.formats.peft_keys import PREFIX, bare_path

_LORA = re.compile(r"\.lora_|\.base_layer\.|\.token_adapter\b|\.trainable_tokens")
_INSIDE = re.compile(r"\.(original_module|modules_to_save)(\.[^.]+(?=\.))?")
"""What files of a wrapper's whole state have in a name; PEFT itself takes it out."""
BY_TASK = ("classifier", "score", "qa_outputs")
"""Names that PEFT adds by task type, whether or not the model has such a module."""


def to_tensors(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The modules as PEFT's file has them."""
    return {f"{PREFIX}{path}.{key}": value for path, module in modules.items() for key, value in module.items()}


def split_modules(
    where: str, names: object, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module path → name in it → tensor, the other tensors). `names`: `modules_to_save` of the settings, ends of paths.

    Raises AdapterFileError where the settings name modules and the file has none of them, or two of one.
    """
    ends = [name for name in names if isinstance(name, str) and name] if isinstance(names, list) else []
    found: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for name, value in sorted(tensors.items(), key=lambda item: bool(_INSIDE.search(item[0]))):
        plain = bare_path(_INSIDE.sub("", name))
        path = None if _LORA.search(name) else _module(plain, ends)
        if path is None:
            left[name] = value
            continue
        key = plain.removeprefix(f"{path}.")
        if _told(found.get(path, {}), name, value):
            continue
        if key in found.setdefault(path, {}):
            raise AdapterFileError(
                f"{where}: {name!r} is a second {key!r} of module {path!r}: two adapters in a file. Save each by itself."
            )
        found[path][key] = value
    met = {end for end in ends if any(path.endswith(end) for path in found)}
    if missing := [end for end in ends if end not in met and not (found and end in BY_TASK)]:
        raise AdapterFileError(
            f"{where}: modules_to_save names {missing[0]!r}, and no tensor of such a module is there: the file is incomplete. "
            "Fetch or save it again."
        )
    return dict(sorted(found.items())), left


def _told(module: Mapping[str, Tensor], name: str, value: Tensor) -> bool:
    """Whether a wrapper's tensor is of no use: where `bias` is "all" PEFT saves its biases, and the base's, beside the module."""
    if not module or not _INSIDE.search(name):
        return False
    ends = (key for key in module if name.endswith(f".{key}"))
    return ".original_module." in name or any(torch.equal(module[key], value) for key in ends)


def _module(name: str, ends: Sequence[str]) -> str | None:
    """The outermost module of a tensor's name that one of the ends names."""
    parts = name.split(".")
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((path for path in paths if path.endswith(tuple(ends))), None) if ends else None


def check_modules(modules: Mapping[str, Mapping[str, Tensor]], layers: Collection[str]) -> None:
    """Raise AdapterFileError for a module without tensors, or one that LoRA layers are in."""
    for path, module in modules.items():
        if not any(value.dtype in SAVED_FLOATS for value in module.values()):
            raise AdapterFileError(f"module {path!r}: saved in full, and none of its tensors is a parameter")
        if inner := next((layer for layer in layers if layer == path or layer.startswith(f"{path}.")), None):
            raise AdapterFileError(
                f"module {path!r} is saved in full and layer {inner!r} in it has LoRA: two adapters in a file. Save "
                "each by itself."
            )


def refuse_modules(adapter: Adapter, form: str) -> None:
    """Raise AdapterFileError where an adapter has modules that were trained in full, which `form` can't hold."""
    if adapter.modules:
        shown = ", ".join(list(adapter.modules)[:3])
        raise AdapterFileError(
            f"{form} can't hold modules that were trained in full ({shown}), and without them the adapter would compute "
            "something else. Save it in PEFT's form, or merge it (lorabank merge)."
        )
