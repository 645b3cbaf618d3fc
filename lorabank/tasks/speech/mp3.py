"""MP3 files that don't say how many frames they have. libsndfile guesses their length by the first frame's bitrate, and reads no
more than that: of a variable bitrate maybe a part. Their frames are counted here, and the number is put before them.
"""

from __future__ import annotations

from collections.abc import Iterator

_BITRATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_BITRATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
"""Thousands of bits a second by index, of MPEG 1 and of MPEG 2 and 2.5 (ISO 11172-3 and 13818-3, layer III)."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Samples a second, by the two bits of the version."""
_MONO, _WIDE = 3, 9
"""Bits of a single channel; a bitrate whose frame has room for the number."""


def start_of(data: bytes) -> int:
    """Where the frames begin, behind an ID3 tag."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))


def samples_in(data: bytes) -> int:
    """Samples a channel of all frames."""
    return sum(_samples(data[at + 1]) for at in _frames(data))


def with_count(data: bytes) -> bytes:
    """The file with a Xing header before its frames, which says how many they are. Its first frame has to be one."""
    start = start_of(data)
    head = bytes([data[start], data[start + 1] | 1, _WIDE << 4 | data[start + 2] & 0x0C, data[start + 3]])  # no check sum
    mono = head[3] >> 6 == _MONO
    side = (17 if mono else 32) if _version(head[1]) == 3 else (9 if mono else 17)
    frames = sum(1 for _ in _frames(data))
    first = head + bytes(side) + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return first.ljust(_length(head), b"\0") + data[start:]


def _frames(data: bytes) -> Iterator[int]:
    """Where each frame begins, of the first one's version and rate; what lies between them is passed over, as decoders do."""
    at = start_of(data)
    if not _length(data[at : at + 4]):
        return
    kind = _kind(data, at)
    while at >= 0:
        length = _length(data[at : at + 4])
        if _kind(data, at) == kind and 0 < length <= len(data) - at:
            yield at
            at += length
        else:
            at = _next(data, at + 1, kind)


def _next(data: bytes, start: int, kind: tuple[bytes, int]) -> int:
    """Where the next frame begins that another or the file's end follows; -1 where none does."""
    at = data.find(b"\xff" + kind[0], start)
    while at >= 0:
        end = at + _length(data[at : at + 4])
        if (
            _kind(data, at) == kind
            and end > at
            and (end == len(data) or (_kind(data, end) == kind and _length(data[end : end + 4])))
        ):
            return at
        at = data.find(b"\xff" + kind[0], at + 1)
    return -1


def _kind(data: bytes, at: int) -> tuple[bytes, int]:
    """Of the frame there: version, layer and check sum, and the bits of the rate."""
    return data[at + 1 : at + 2], data[at + 2] & 0x0C if at + 2 < len(data) else -1


def _version(byte: int) -> int:
    return byte >> 3 & 3


def _samples(byte: int) -> int:
    return 1152 if _version(byte) == 3 else 576


def _length(head: bytes) -> int:
    """Bytes of a frame of layer III by its header; 0 for what isn't one."""
    if len(head) < 4 or head[0] != 0xFF or head[1] >> 5 != 7 or head[1] >> 1 & 3 != 1 or _version(head[1]) == 1:
        return 0
    index, rate = head[2] >> 4, head[2] >> 2 & 3
    if index in (0, 15) or rate == 3:
        return 0
    bitrate = (_BITRATES_1 if _version(head[1]) == 3 else _BITRATES_2)[index]
    return _samples(head[1]) // 8 * bitrate * 1000 // _RATES[_version(head[1])][rate] + (head[2] >> 1 & 1)
