"""`load_adapter`: an adapter from a folder or a file, its form told by what is in it and never by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorabank.config.paths import expanded
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.choice import adapters_in, chosen, listed, only_inside, say_which
from lorabank.formats.components import COMPONENTS
from lorabank.formats.diffusers import SETTINGS, load_diffusers
from lorabank.formats.files import PICKLE_SUFFIXES, Header, read_header, refuse_pickle
from lorabank.formats.kohya import load_kohya
from lorabank.formats.kohya_names import PREFIXES
from lorabank.formats.peft import CONFIG_FILE, TENSORS_FILE, load_peft


@dataclass(frozen=True, kw_only=True)
class Format:
    """A form that adapters come in."""

    title: str
    recognise: Callable[[Header], bool]
    """Whether a safetensors header is of this form."""
    load: Callable[[Path, bool], Adapter]
    """Reads the file at this path; with True NaN and infinity too, to look at them."""


def _any_key(*parts: str, start: tuple[str, ...] = ()) -> Callable[[Header], bool]:
    """Whether a tensor's name has one of the parts, or begins with one of `start`."""
    return lambda header: any(name.startswith(start) or any(part in name for part in parts) for name in header.tensors)


def _is_diffusers(header: Header) -> bool:
    parts = (".lora_A.", ".lora.down.", "_lora.down.", ".lora_linear_layer.down.")
    lora = [name for name in header.tensors if any(part in name for part in parts)]
    components = tuple(f"{name}." for name in COMPONENTS)
    return SETTINGS in header.metadata or any(name.startswith(components) for name in lora)


def _load_peft_file(path: Path, allow_non_finite: bool) -> Adapter:
    if path.name != TENSORS_FILE:
        raise AdapterFileError(f"{path}: PEFT's tensors under another name; name the file {TENSORS_FILE}, beside {CONFIG_FILE}")
    return load_peft(path.parent, allow_non_finite=allow_non_finite)


FORMATS: Mapping[str, Format] = {
    "kohya": Format(
        title="kohya",
        recognise=_any_key(".lora_down.", ".lora_up.", ".hada_w", ".lokr_w", ".dora_scale", start=PREFIXES),
        load=lambda path, any_numbers: load_kohya(path, allow_non_finite=any_numbers),
    ),
    "diffusers": Format(
        title="diffusers",
        recognise=_is_diffusers,
        load=lambda path, any_numbers: load_diffusers(path, allow_non_finite=any_numbers),
    ),
    "peft": Format(title="PEFT", recognise=_any_key(".lora_A", ".lora_B", ".lora_embedding_A"), load=_load_peft_file),
}
"""Forms by name, in the order in which they are tried: the first that recognises a file reads it."""


def load_adapter(path: str | Path, *, allow_non_finite: bool = False) -> Adapter:
    """Read the adapter in a folder or a file; `folder:name` is one of several in a folder.

    `allow_non_finite`: NaN and infinity are read too, to look at them. Raises AdapterFileError that says what was found instead,
    and the way out.
    """
    named = expanded(path, place="adapter", kind=AdapterFileError)
    path = chosen(named)
    if not path.exists():
        raise AdapterFileError(f"{path}: no such file or folder{_closest_path(path)}")
    if not path.is_dir():
        return _load_file(path, allow_non_finite)
    if path == named:
        say_which(path)
    return _load_folder(path, allow_non_finite)


def load_adapters(folder: str | Path) -> dict[str, Adapter]:
    """Every adapter in a folder by its name, `default` for one in the folder itself. Raises AdapterFileError for none."""
    folder = expanded(folder, place="folder", kind=AdapterFileError)
    found = adapters_in(folder) if folder.is_dir() else {}
    if not found:
        load_adapter(folder)  # says what it is instead, where that can't be read
        raise AdapterFileError(f"{folder}: an adapter in a file, not a folder of adapters. Read it with Adapter.load.")
    return {name: _load_folder(path, False) for name, path in found.items()}


def _load_file(path: Path, allow_non_finite: bool) -> Adapter:
    if path.name == CONFIG_FILE:
        return load_peft(path.parent, allow_non_finite=allow_non_finite)
    if path.suffix.lower() == ".json":
        where = f"Name the folder: {path.parent}" if (path.parent / CONFIG_FILE).is_file() else "Name the adapter's folder"
        raise AdapterFileError(f"{path}: a JSON file, which holds no tensors. {where}.")
    if not path.is_file():  # opening a pipe waits for ever
        raise AdapterFileError(f"{path}: neither a file nor a folder. Name an adapter's file or folder.")
    header = read_header(path)
    for form in FORMATS.values():
        if form.recognise(header):
            return form.load(path, allow_non_finite)
    shown = ", ".join(repr(name) for name in list(header.tensors)[:3]) or "no tensors"
    raise AdapterFileError(f"{path}: holds no adapter in a form that is known ({listed(FORMATS)}). It holds {shown}.")


def _load_folder(folder: Path, allow_non_finite: bool) -> Adapter:
    if (folder / CONFIG_FILE).is_file() or (folder / TENSORS_FILE).is_file():
        return load_peft(folder, allow_non_finite=allow_non_finite)
    files = sorted(item for item in folder.iterdir() if item.is_file())
    if several := only_inside(folder):
        raise AdapterFileError(several)
    if any(item.name.startswith(("model.safetensors", "model-0", "pytorch_model")) for item in files):
        raise AdapterFileError(
            f"{folder}: holds a whole model, not an adapter. Use it as the base model; an adapter folder has {CONFIG_FILE}."
        )
    tensors = [item for item in files if item.suffix == ".safetensors"]
    if len(tensors) == 1:
        return _load_file(tensors[0], allow_non_finite)
    if tensors:
        names = listed([item.name for item in tensors])
        raise AdapterFileError(f"{folder}: holds {len(tensors)} safetensors files ({names}). Name the one to load.")
    for item in files:
        if item.suffix.lower() in PICKLE_SUFFIXES:
            refuse_pickle(item)
    found = listed([item.name for item in files]) if files else "nothing"
    raise AdapterFileError(f"{folder}: holds no adapter: expected {CONFIG_FILE} and {TENSORS_FILE}, found {found}")


def _closest_path(path: Path) -> str:
    """What the path may have meant: the existing name closest to its first missing part."""
    parent, missing = path.parent, path.name
    while not parent.exists() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    names = sorted(item.name for item in parent.iterdir()) if parent.is_dir() else []
    hits = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    if hits:
        return f" (did you mean {parent / hits[0]}?)"
    if not path.is_absolute() and len(path.parts) == 2:
        return f". To load it from the Hugging Face hub, download it first: hf download {path} --local-dir {path.name}"
    return f"; {parent} holds {listed(names)}" if names else ""
