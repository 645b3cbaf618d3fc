"""Recordings: any rate, channels and container; and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lorabank.data.row import RowError
from lorabank.tasks.speech import mp3
from lorabank.tasks.speech.audio import load_sound
from tests.tasks.speech.tiny import RATE, tone


def written(path: Path, samples: np.ndarray, rate: int, **how: Any) -> Path:
    soundfile.write(path, samples, rate, **how)
    return path


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_is_the_same_tone_at_the_models_rate(tmp_path: Path, rate: int) -> None:
    sound = load_sound(written(tmp_path / "a.wav", tone(0.5, 440, rate), rate), RATE)
    assert (sound.rate, sound.source_rate, sound.samples_S.dtype) == (RATE, rate, np.float32)
    assert abs(len(sound.samples_S) - 0.5 * RATE) <= 1
    spectrum = np.abs(np.fft.rfft(sound.samples_S))
    assert abs(spectrum.argmax() * RATE / len(sound.samples_S) - 440) < 3
    assert abs(np.abs(sound.samples_S).max() - 0.33) < 0.05


@pytest.mark.parametrize(("suffix", "close"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.1), (".mp3", 0.1)])
def test_containers(tmp_path: Path, suffix: str, close: float) -> None:
    samples = tone(0.5, 440)
    sound = load_sound(written(tmp_path / f"a{suffix}", samples, RATE), RATE)
    n = min(len(samples), len(sound.samples_S))
    assert n >= len(samples) - 1200  # an MP3's padding
    assert np.corrcoef(samples[:n], sound.samples_S[:n])[0, 1] > 1 - close


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(0.2, 300), tone(0.2, 900)
    stereo = written(tmp_path / "a.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    sound = load_sound(stereo, RATE)
    assert sound.source_channels == 2
    assert np.allclose(sound.samples_S, (left + right) / 2, atol=1e-6)


def test_what_datasets_holds(tmp_path: Path) -> None:
    samples = tone(0.2, 300)
    path = written(tmp_path / "a.flac", samples, RATE)
    expected = load_sound(path, RATE).samples_S
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC")
    integers = {"array": (samples * 32767).astype(np.int16), "sampling_rate": RATE}
    channels_first = {"array": np.stack([samples, samples]), "sampling_rate": RATE}
    for source in (
        buffer.getvalue(),
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(path)},
        {"array": samples.astype(np.float64), "sampling_rate": float(RATE)},
        {"array": samples.tolist(), "sampling_rate": RATE},
        integers,
        channels_first,
    ):
        assert np.allclose(load_sound(source, RATE).samples_S, expected, atol=1e-4)
    assert np.array_equal(load_sound("a.flac", RATE, near=tmp_path).samples_S, expected)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros(1600, np.float32), "silent"),
        (np.full(1600, 1e-5, np.float32), "silent"),
        (tone(0.01, 400), "shorter than 0.02 s"),
        (np.array([0.1, np.nan] * 800, np.float32), "NaN"),
    ],
)
def test_what_holds_nothing(tmp_path: Path, samples: np.ndarray, reason: str) -> None:
    for source in (written(tmp_path / "a.wav", samples, RATE, subtype="FLOAT"), {"array": samples, "sampling_rate": RATE}):
        with pytest.raises(RowError, match=reason):
            load_sound(source, RATE)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_corrupt_files(tmp_path: Path, suffix: str) -> None:
    whole = written(tmp_path / f"whole{suffix}", tone(1.0, 440), RATE).read_bytes()
    for name, data in {"text": b"<html>not found</html>" * 20, "none": b"", "head": whole[:20]}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        with pytest.raises(RowError, match=r"can't be decoded|cut off|no samples"):
            load_sound(path, RATE)


FORMATS: dict[str, dict[str, Any]] = {
    "WAV": {},
    "RF64": {},
    "AIFF": {},
    "AU": {},
    "FLAC": {},
    "OGG Vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "OGG Opus": {"format": "OGG", "subtype": "OPUS"},
    "MP3": {"bitrate_mode": "CONSTANT"},
    "MP3 of variable bitrate": {"format": "MP3", "bitrate_mode": "VARIABLE"},
}


def encoded(name: str, samples: np.ndarray) -> bytes:
    stream, how = io.BytesIO(), {"format": name, **FORMATS[name]}
    soundfile.write(stream, samples, RATE, **how)
    return stream.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_in_the_middle(tmp_path: Path, name: str) -> None:
    """From a path and from bytes, wherever it is cut; whole, it has all its samples."""
    samples = tone(4.0, 440)
    data = encoded(name, samples)
    assert abs(len(load_sound({"bytes": data}, RATE).samples_S) - len(samples)) <= 1
    for share in (0.9, 0.7, 0.5, 0.3):
        cut = data[: int(len(data) * share)]
        (tmp_path / "cut").write_bytes(cut)
        for source in (tmp_path / "cut", {"bytes": cut}):
            with pytest.raises(RowError, match=r"is cut off|can't be decoded: it is damaged, cut off"):
                load_sound(source, RATE)


def test_an_mp3_that_is_cut_between_frames() -> None:
    """Nothing in it is broken: the number of frames in its first one tells."""
    data = encoded("MP3", tone(4.0, 440))
    half = len(data) // 2
    for cut in range(half, half + 300):
        with pytest.raises(RowError, match="is cut off: it has fewer samples than its header says"):
            load_sound({"bytes": data[:cut]}, RATE)
    bare = data[data.index(data[:3], 1) :]  # without that frame nobody knows its length, and a guess is no fault
    assert len(load_sound({"bytes": bare}, RATE).samples_S) > 2 * RATE
    assert len(load_sound({"bytes": bare[: len(bare) // 2]}, RATE).samples_S) > RATE
    tag = b"ID3\x04\0\0" + bytes([0, 0, 2, 0]) + bytes(256)
    with pytest.raises(RowError, match="fewer samples"):
        load_sound({"bytes": tag + data[:half]}, RATE)
    assert len(load_sound({"bytes": tag + data}, RATE).samples_S) == 4 * RATE


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_of_variable_bitrate_that_does_not_say_its_length(rate: int, channels: int) -> None:
    """The first frames of noise are long, so a guess by them is too short: all of it is read nonetheless."""
    quiet, loud = tone(8.0, 440, rate), np.random.default_rng(0).normal(size=4 * rate).astype(np.float32) * 0.2
    samples = np.concatenate([loud[: rate // 2], quiet, loud])
    whole, stream = np.stack([samples] * channels, 1), io.BytesIO()
    soundfile.write(stream, whole, rate, format="MP3", bitrate_mode="VARIABLE")
    data = stream.getvalue()
    bare = data[list(mp3._frames(data))[1] :]
    with soundfile.SoundFile(io.BytesIO(bare)) as guessed:
        assert guessed.frames < 0.9 * len(samples)
    found, expected = load_sound({"bytes": bare}, rate), load_sound({"bytes": data}, rate)
    assert abs(len(found.samples_S) - len(samples)) < 4 * 1152
    assert mp3.samples_in(bare) == pytest.approx(len(found.samples_S), abs=2 * 1152)
    shift = len(found.samples_S) - len(expected.samples_S)  # the count has an encoder's delay, too, which is cut off
    middle = slice(3 * rate, 5 * rate)
    best = max(
        float(np.corrcoef(found.samples_S[middle], np.roll(expected.samples_S, by)[middle])[0, 1])
        for by in range(max(shift, 0) + 1200)
    )
    assert best > 0.99
    tag = b"ID3\x04\0\0" + bytes([0, 0, 2, 0]) + bytes(256)
    assert len(load_sound({"bytes": tag + bare}, rate).samples_S) == len(found.samples_S)
    assert len(load_sound({"bytes": bare + b"TAG" + bytes(125)}, rate).samples_S) == len(found.samples_S)
    cuts = list(mp3._frames(bare))
    for gap in (b"\xff" * 500, bytes(500), tag):  # damage, or two files one after the other
        broken = bare[: cuts[30]] + gap + bare[cuts[30] :]
        assert mp3.samples_in(broken) == mp3.samples_in(bare)
        assert abs(len(load_sound({"bytes": broken}, rate).samples_S) - len(found.samples_S)) <= 3 * 1152


def test_a_header_that_declares_more_than_memory_has() -> None:
    data = bytearray(encoded("FLAC", tone(1.0, 440)))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    with pytest.raises(RowError, match=r"can't be decoded|fewer samples than its header says"):
        load_sound({"bytes": bytes(data)}, RATE)
    song = encoded("MP3", tone(3.0, 440))
    at = song.find(b"Xing") if b"Xing" in song else song.find(b"Info")
    assert at > 0
    with pytest.raises(RowError, match=r"cut off|can't be decoded"):
        load_sound({"bytes": song[: at + 8] + b"\xff\xff\xff\xf0" + song[at + 12 :]}, RATE)


def test_a_flac_of_a_pipe() -> None:
    """Its writer couldn't say how many samples follow."""
    data = bytearray(encoded("FLAC", tone(1.0, 440)))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    with pytest.raises(RowError, match=r"doesn't say how many samples it has, .*: encode it again"):
        load_sound({"bytes": bytes(data)}, RATE)


def test_a_wav_that_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(1.0, 440), RATE)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(RowError, match="cut off"):
        load_sound(path, RATE)
    streamed = bytearray(path.read_bytes())
    streamed[4:8] = b"\xff\xff\xff\xff"  # a pipe's: its writer didn't know the length
    path.write_bytes(streamed)
    assert len(load_sound(path, RATE).samples_S) > 9_000


def test_whole_numbers_are_scaled_by_what_they_hold() -> None:
    """16 bits are 16 bits in any type; wider ones are told by their peak. Eight unsigned bits are silent at 128."""
    wave = tone(0.2, 300) * 3.0  # near full scale, as recordings are
    for scale, kinds in {2**15: (np.int16, np.int32, np.int64), 2**23: (np.int32, np.int64), 2**31: (np.int64,)}.items():
        for kind in kinds:
            array = (wave.astype(np.float64) * (scale - 1)).round().clip(-scale, scale - 1).astype(kind)
            for given in (array, array.tolist()):
                found = load_sound({"array": given, "sampling_rate": RATE}, RATE).samples_S
                assert np.allclose(found, wave.clip(-1, 1), atol=1e-4)
    eight = load_sound({"array": (wave.clip(-1, 1) * 127 + 128).round().astype(np.uint8), "sampling_rate": RATE}, RATE)
    assert np.allclose(eight.samples_S, wave.clip(-1, 1), atol=0.02)


def test_a_name_may_begin_like_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = load_sound(written(tmp_path / "~draft 1.wav", tone(0.2, 300), RATE), RATE).samples_S
    assert np.array_equal(load_sound("~draft 1.wav", RATE, near=tmp_path).samples_S, samples)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert np.array_equal(load_sound("~/~draft 1.wav", RATE).samples_S, samples)


def test_a_kind_that_libsndfile_does_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.M4A").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    with pytest.raises(RowError, match=r"libsndfile doesn't read \.m4a: convert it"):
        load_sound(tmp_path / "a.M4A", RATE)


def test_a_missing_recording_is_told_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sounds").mkdir()
    for name, reason in (
        ("gone.wav", f"there is no such recording in {tmp_path / 'sounds'}"),
        ("deep/gone.wav", f"there is no such recording (nor a folder {tmp_path / 'sounds' / 'deep'})"),
        (str(tmp_path / "gone.wav"), f"there is no such recording in {tmp_path}"),
    ):
        with pytest.raises(RowError) as found:
            load_sound(name, RATE, near=tmp_path / "sounds")
        assert found.value.reason == reason
    monkeypatch.chdir(tmp_path)
    soundfile.write("sounds/here.wav", tone(0.3, 500), RATE)
    with pytest.raises(RowError, match="names count from the folder of their table, not from where you are"):
        load_sound("sounds/here.wav", RATE, near=tmp_path / "sounds")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing.wav", "no such recording"),
        ("", "path is empty"),
        (".", "a folder"),
        (3, "got int"),
        ({"sampling_rate": 3}, "needs array and sampling_rate"),
        ({"array": [0.1] * 900, "sampling_rate": None}, "whole sampling_rate"),
        ({"array": [0.1] * 900, "sampling_rate": 10}, "sample rate 10 Hz"),
        ({"array": [[0.1], [0.2, 0.3]], "sampling_rate": RATE}, "different lengths"),
        ({"array": ["a", "b"], "sampling_rate": RATE}, "samples are numbers"),
        ({"array": [0.1] * 900, "sampling_rate": float("nan")}, "whole sampling_rate, got nan"),
        ({"array": [0.1] * 900, "sampling_rate": np.float32("inf")}, "whole sampling_rate, got"),
        ("~draft 1.wav", "no such recording"),
        ("UklGRiQAAABXQVZF" * 30, "longer than a file's may be: is it the recording itself, as text"),
        ("a\0b.wav", "holds NUL or half of a surrogate pair"),
        ("a\ud83d.wav", "holds NUL or half of a surrogate pair"),
        (b"nothing", "can't be decoded"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, source: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        load_sound(source, RATE, near=tmp_path)
