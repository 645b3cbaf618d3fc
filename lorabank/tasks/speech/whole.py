"""Whether a recording's file is whole. Decoders read what is there of a cut one, without a word.

Containers say their length: in bytes (RIFF, RF64, AIFF, AU, Ogg's pages), or in samples (FLAC, MP3 with a Xing header).
"""

from __future__ import annotations

import os
from typing import BinaryIO

from lorabank.data.row import RowError

UNKNOWN = 1 << 62
"""Samples from which on a header says that nobody knew them."""
MP3 = ("MP3", "MPEG")
"""How soundfile calls the format."""
MP3_SLACK = 2 * 1152
"""Samples of two frames of MP3, by which encoders count differently."""
_STREAMED = 0xFFFFFF00
"""Bytes from which on a header was written by what couldn't go back to fill it in."""
_PAGE, _ENOUGH = 27, 1 << 17


def check_whole(file: BinaryIO, what: str) -> None:
    """Raise RowError for a container that ends before its header says; for others nothing is known here. `what`: its name."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(32)
    said = _ogg_end(file, size) if head[:4] == b"OggS" else _declared(head)
    file.seek(0)
    if said is not None and said > size + 1:  # a last byte of padding may be missing
        raise RowError(f"{what} is cut off: the file is shorter than its header says")


def missing_samples(file: BinaryIO, kind: str, declared: int, read: int) -> int:
    """How many samples of those that a header declares couldn't be read; 0 where the number is a guess. `kind`: soundfile's."""
    if declared <= read:
        return 0
    if not kind.startswith(MP3):
        return declared - read
    return declared - read if is_counted(file) and declared - read > MP3_SLACK else 0


def _declared(head: bytes) -> int | None:
    """Bytes of the file by its header; None where it doesn't say."""
    little, big = int.from_bytes(head[4:8], "little"), int.from_bytes(head[4:8], "big")
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return little + 8 if 0 < little < _STREAMED else None
    if head[:4] == b"RF64" and head[12:16] == b"ds64":
        return int.from_bytes(head[20:28], "little") + 8
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return big + 8 if 0 < big < _STREAMED else None
    if head[:4] == b".snd":
        data = int.from_bytes(head[8:12], "big")
        return big + data if data < _STREAMED else None
    return None


def _ogg_end(file: BinaryIO, size: int) -> int | None:
    """Where the last page ends, by its own table of segments."""
    start = max(0, size - _ENOUGH)  # a page has at most 65,307 bytes
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return None
    table = tail[at + _PAGE : at + _PAGE + tail[at + _PAGE - 1]] if len(tail) >= at + _PAGE else b""
    whole = len(tail) >= at + _PAGE and len(table) == tail[at + _PAGE - 1]
    end = start + at + _PAGE + len(table) + sum(table)
    begun = end < size and b"OggS\0".startswith(tail[end - start :])  # a page of which there are a few letters
    return end if whole and not begun else size + _PAGE


def is_counted(file: BinaryIO) -> bool:
    """Whether an MP3 file says how many frames it has: without that, its length is a guess by the first frame's bitrate."""
    file.seek(0)
    head = file.read(10)
    tag = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)) + 10
    file.seek(tag if head[:3] == b"ID3" else 0)
    first = file.read(256)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
