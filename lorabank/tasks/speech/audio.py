"""Recordings as samples: any file that libsndfile reads, bytes or arrays → mono float32 at the model's rate.

Nothing of torchaudio: soundfile decodes, soxr resamples. S samples a channel, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from lorabank.data.row import RowError
from lorabank.errors import MissingExtraError
from lorabank.tasks.speech import mp3
from lorabank.tasks.speech.arrays import given
from lorabank.tasks.speech.names import file_named
from lorabank.tasks.speech.whole import MP3, MP3_SLACK, UNKNOWN, check_whole, is_counted, missing_samples

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf")
UNREAD_SUFFIXES = (".m4a", ".m4b", ".aac", ".wma", ".amr", ".ac3", ".ape", ".mka", ".ra", ".wv")
"""Of recordings that libsndfile doesn't read: they are named, not left out in silence."""
SILENT = 10 ** (-80 / 20)
"""Peak below which a recording holds nothing: −80 dB of full scale, a few steps of 16 bits."""
SHORTEST_S = 0.02
"""Seconds below which there is nothing to hear: less than one frame of the encoder."""
BLOCK = 1 << 22
"""Samples that are read at a time."""
MAX_RATE, MIN_RATE = 768_000, 1_000
"""Samples a second outside of which a rate is taken for a damaged header."""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """One recording."""

    samples_S: np.ndarray
    """float32, mono, at `rate`."""
    rate: int
    source_rate: int
    """Samples a second before resampling."""
    source_channels: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples_S) / self.rate


def load_sound(source: Any, rate: int, *, near: Path | None = None) -> Sound:
    """The recording that `source` names or holds: a path (relative ones: below `near`), bytes, or what `datasets` has: a dict
    with `array` and `sampling_rate`, or with `bytes` or `path`.

    Channels are averaged; other rates than `rate` are resampled. Raises RowError, whose reason is the same for equal faults.
    """
    samples, own = _decoded(source, near)
    if not MIN_RATE <= own <= MAX_RATE:
        raise RowError(f"sample rate {own:,} Hz: expected {MIN_RATE:,} to {MAX_RATE:,}")
    channels = samples.shape[1] if samples.ndim == 2 else 1
    mono = samples.mean(1) if samples.ndim == 2 else samples
    if not len(mono):
        raise RowError("the recording is empty: it has no samples")
    if not np.isfinite(mono).all():
        raise RowError("the recording holds NaN or infinite samples")
    if own != rate:
        mono = _soxr().resample(mono, own, rate)
    mono = np.ascontiguousarray(mono, dtype=np.float32)
    if len(mono) < SHORTEST_S * rate:
        raise RowError(f"the recording is shorter than {SHORTEST_S:g} s")
    if float(np.abs(mono).max()) < SILENT:
        raise RowError("the recording is silent: no sample is louder than -80 dB of full scale")
    return Sound(samples_S=mono, rate=rate, source_rate=own, source_channels=channels)


def _decoded(source: Any, near: Path | None) -> tuple[np.ndarray, int]:
    """(samples (S,) or (S, C), samples a second)."""
    if isinstance(source, Mapping):
        if source.get("array") is not None:
            return given(source["array"], source.get("sampling_rate"))
        inner = source.get("bytes") if source.get("bytes") is not None else source.get("path")
        if inner is None:
            raise RowError(
                f"a recording as a dict needs array and sampling_rate, bytes, or path; got {', '.join(map(str, source))}"
            )
        source = inner
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), "the recording")
    if isinstance(source, str | Path):
        path = file_named(source, near)
        try:
            with path.open("rb") as file:
                return _read(file, "the recording")
        except RowError as error:
            if (suffix := path.suffix.lower()) in UNREAD_SUFFIXES:
                raise RowError(f"libsndfile doesn't read {suffix}: convert it to WAV or FLAC, as ffmpeg does") from error
            raise
        except OSError as error:
            raise RowError(f"the recording can't be read ({error.strerror})") from error
    raise RowError(f"a recording is a path, bytes, or a dict of samples; got {type(source).__name__}")


def _read(file: BinaryIO, what: str) -> tuple[np.ndarray, int]:
    """(samples (S,) or (S, C), samples a second)."""
    soundfile = _soundfile()
    check_whole(file, what)
    try:
        with soundfile.SoundFile(file) as sound:
            rate, declared, kind = int(sound.samplerate), int(sound.frames), str(sound.format)
            samples = _blocks(sound, 0 if declared >= UNKNOWN else declared)
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
        raise RowError(f"{what} can't be decoded: it is damaged, cut off, or in a format that libsndfile doesn't read") from error
    if kind.startswith(MP3) and not is_counted(file) and (counted := _with_count(file, declared)) is not None:
        return _read(counted, what)
    if declared >= UNKNOWN:  # a FLAC of a pipe, in which libsndfile can't find its way
        raise RowError(f"{what} doesn't say how many samples it has, as if it was written to a pipe: encode it again")
    if missing_samples(file, kind, declared, len(samples)):
        raise RowError(f"{what} is cut off: it has fewer samples than its header says")
    return samples, rate


def _blocks(sound: Any, declared: int) -> np.ndarray:
    """At most so many samples, a block at a time: what a damaged header declares may be more than any memory has."""
    found: list[np.ndarray] = []
    left = declared
    while left > 0 and len(block := sound.read(min(left, BLOCK), dtype="float32")):
        found.append(block)
        left -= len(block)
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def _with_count(file: BinaryIO, guessed: int) -> BinaryIO | None:
    """An MP3 that doesn't say its length, with it; None where the guess that was read is long enough."""
    file.seek(0)
    data = file.read()
    return io.BytesIO(mp3.with_count(data)) if mp3.samples_in(data) > guessed + MP3_SLACK else None


def as_wav(samples_S: np.ndarray, rate: int) -> bytes:
    """A mono WAV file of 16 bits. Raises MissingExtraError."""
    buffer = io.BytesIO()
    _soundfile().write(buffer, samples_S, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _soundfile() -> ModuleType:
    try:
        import soundfile
    except ImportError as error:
        raise _missing("soundfile") from error
    return soundfile


def _soxr() -> ModuleType:
    try:
        import soxr
    except ImportError as error:
        raise _missing("soxr") from error
    return soxr


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(f"speech: needs {package!r}, which isn't installed: pip install 'lorabank[speech]'")
