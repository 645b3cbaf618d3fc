"""Adapter files on disk: tensors as safetensors with a canonical header, and writes that succeed whole or leave the old file.

The header is written here, because the safetensors library orders metadata differently from run to run; equal tensors must
give equal bytes. Reading checks the header before anything trusts it. Pickles are refused: loading one runs its code.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorabank.errors import AdapterFileError, OutputError

Writer = Callable[[BinaryIO], object]
"""Writes one file's content into an open binary file."""

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # torch's limit
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {code: dtype for dtype, code in _CODES.items()}
"""safetensors' codes to dtypes."""
SAVED_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of an adapter's matrices."""
_BYTES = {code: dtype.itemsize for dtype, code in _CODES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as a header describes it."""

    dtype: str
    """safetensors' code, such as `F32`."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A safetensors header that was checked against its file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def tensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """A writer of `tensors` as safetensors. Equal names, values and metadata give equal bytes, in whatever order they come."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # widest first keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].dtype.itemsize
        if tensors[name].dtype not in _CODES:
            raise OutputError(f"tensor {name!r}: the dtype {tensors[name].dtype} can't be saved. Convert it to float32 first.")
        header[name] = {
            "dtype": _CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            file.write(value.view(torch.uint8).numpy().data if value.numel() else b"")

    return write


def utf8(text: str) -> bytes:
    """Text for a file. Halves of surrogate pairs, as names of files that are no UTF-8 have them, become JSON's `\\udce4`."""
    return text.encode("utf-8", "backslashreplace")


def escaped(text: str) -> str:
    """Text as any file or terminal of UTF-8 takes it (see `utf8`)."""
    return utf8(text).decode()


def write_files(folder: Path, files: Mapping[str, bytes | str | Writer]) -> None:
    """Write all `files` (name in `folder` → content) or none: each under a temporary name, renamed once all are on the disk.

    Text becomes UTF-8 (`utf8`). Raises OutputError when the disk is full or can't be written; files that were there before are
    then unchanged.
    """
    created = not folder.exists()
    staged: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            staged[name] = folder / f".{name}.{secrets.token_hex(4)}.tmp"
            with open(staged[name], "xb") as file:
                if isinstance(content, bytes | str):
                    file.write(content if isinstance(content, bytes) else utf8(content))
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():
            path.replace(folder / name)
        _sync_folder(folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        _raise_output_error(folder, error)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically. Raises OutputError."""
    write_files(path.parent, {path.name: tensors_writer(tensors, metadata)})


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size. Raises AdapterFileError."""
    try:
        refuse_pickle(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"its header claims {length} bytes of a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise AdapterFileError(f"{path}: can't be read ({error.strerror or error}). Look at its permissions.") from error
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata are no strings")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return Header(tensors=entries, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU, as stored) and the metadata of a safetensors file. Raises AdapterFileError."""
    header = read_header(path)
    try:
        return load_file(path), dict(header.metadata)
    except (SafetensorError, ValueError, OSError) as error:
        raise _broken(path, str(error)) from error


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, value in tensors.items() if value.is_floating_point() and not _all_finite(value)), None)


def _all_finite(value: Tensor) -> bool:
    return bool((value if value.dtype in SAVED_FLOATS else value.float()).isfinite().all())  # torch can't ask of 8 bits


def refuse_pickle(path: Path) -> None:
    """Raise AdapterFileError when `path` is a pickle or another format that is known and not safetensors."""
    with open(path, "rb") as file:
        start = file.read(8)
    # A safetensors file begins with a length whose upper half is zero, so bytes like these can't be one.
    pickled = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and any(start[4:]))
    if path.suffix.lower() in PICKLE_SUFFIXES or pickled:
        raise AdapterFileError(
            f"{path}: a pickled file, and loading one runs whatever code it holds; only safetensors are read. If you trust it, "
            'convert it once: safetensors.torch.save_file(torch.load(file, weights_only=True), "adapter_model.safetensors").'
        )
    if start[:4] == b"GGUF":
        raise AdapterFileError(
            f"{path}: a GGUF file; adapters are read from safetensors. Use the file that it was converted from."
        )


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {name!r} lacks a dtype, a shape or offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _broken(path, f"{name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _broken(path, f"{name!r} has the impossible offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _broken(path, f"{name!r} has the unknown dtype {dtype!r}; known are {', '.join(_BYTES)}")
    if len(shape) > MAX_DIMENSIONS or math.prod(n for n in shape if n) >= 2**63:  # torch can't make it, even without elements
        raise _broken(path, f"{name!r} has an impossible shape of {len(shape)} dimensions")
    expected = _BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != expected:
        raise _broken(
            path, f"{name!r} needs {expected} bytes as {dtype} {shape}, its offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_bytes: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise _broken(
                path, f"{name!r} begins at byte {entry.begin} where byte {position} was expected: tensors overlap or leave a gap"
            )
        position = entry.end
    if position != data_bytes:
        raise _broken(path, f"its tensors need {position} bytes and it holds {data_bytes}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _broken(path: Path, what: str) -> AdapterFileError:
    return AdapterFileError(f"{path}: truncated, tampered with, or no safetensors file: {what}. Fetch or save the file again.")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # the renames themselves must reach the disk
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise_output_error(folder: Path, error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"{folder}: the disk is full. Nothing was replaced; free some space or choose another folder."
    else:
        message = f"{folder}: can't be written ({error.strerror or error}). Nothing was replaced; choose another folder."
    raise OutputError(message) from error
