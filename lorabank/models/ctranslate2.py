"""CTranslate2's `model.bin`, read with numpy alone: a header, named arrays, and other names for some of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorabank.errors import ModelError

FILE_VERSION = 6
"""The one version of the container that is read: that of CTranslate2 2.0 and later."""
DTYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}
"""CTranslate2's numbers of types; bfloat16 (5) has no numpy type."""


@dataclass(frozen=True, kw_only=True)
class CTranslate2File:
    """What a `model.bin` holds."""

    spec: str
    """The kind of model, such as `WhisperSpec`."""
    revision: int
    arrays: dict[str, np.ndarray]
    """Variable to array; a scalar has shape ()."""
    aliases: dict[str, str]
    """Second name to variable: tied weights are stored once."""


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.data, self.place = path, path.read_bytes(), 0

    def bytes(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise ModelError(
                f"{self.path}: cut off: expected {count:,} more bytes at {self.place:,}, the file has {len(self.data):,} in all. "
                "Copy or download it again."
            )
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        raw = self.bytes(self.number("H"))
        try:
            return raw.removesuffix(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self.path}: a name at byte {self.place - len(raw):,} is no text; not a CTranslate2 file"
            ) from error


def read_ctranslate2(path: Path) -> CTranslate2File:
    """Every array of a `model.bin`. Raises ModelError for a file that is cut off, of another version or of an unread type.

    All numbers are little-endian: uint32 version, a name (uint16 length with its closing zero) and uint32 revision of the
    specification, uint32 count, then for each variable its name, uint8 rank, uint32 dimensions, uint8 type, uint32 bytes and the
    values; at the end uint32 count of aliases, each two names.
    """
    reader = _Reader(path)
    version = reader.number("I")
    if version != FILE_VERSION:
        raise ModelError(
            f"{path}: expected a CTranslate2 file of version {FILE_VERSION}, got {version}. Convert the model again."
        )
    spec, revision = reader.text(), reader.number("I")
    arrays: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = tuple(reader.number("I") for _ in range(reader.number("B")))
        kind, size = reader.number("B"), reader.number("I")
        if kind not in DTYPES:
            raise ModelError(f"{path}: {name} has the type {kind}; {', '.join(DTYPES.values())} are read. Convert to float16.")
        dtype = np.dtype(DTYPES[kind])
        raw = reader.bytes(size)
        if size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ModelError(f"{path}: {name} has {size:,} bytes for the shape {shape} of {dtype}. Copy or download it again.")
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
    aliases = {reader.text(): reader.text() for _ in range(reader.number("I"))}
    if reader.place != len(reader.data):
        raise ModelError(f"{path}: {len(reader.data) - reader.place:,} bytes follow where the file should end. Copy it again.")
    return CTranslate2File(spec=spec, revision=revision, arrays=arrays, aliases=aliases)
