"""The Free Spoken Digit Dataset as audio folders: a folder a speaker and part, with metadata.csv.

Test: the first five recordings of each digit, as the data set's authors have it. Training: of the others, the first `per_digit`.
"""

from __future__ import annotations

import csv
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

WORDS = "zero one two three four five six seven eight nine".split()
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TEST = 5


def unpack(archive: Path, folder: Path) -> Path:
    """The recordings `{digit}_{speaker}_{index}.wav` of the archive; returns their folder."""
    found = folder / "recordings"
    if not found.is_dir():
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder, [name for name in file.namelist() if name.endswith(".wav")])
    return found


def write_metadata(path: Path, recordings: Path, speakers: Sequence[str], indices: Sequence[int]) -> Path:
    """A table of these speakers' recordings, with transcripts: the digits as words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["file_name", "transcription", "speaker"])
        for speaker in speakers:
            for digit, word in enumerate(WORDS):
                for index in indices:
                    out.writerow([recordings / f"{digit}_{speaker}_{index}.wav", word, speaker])
    return path


def connected(folder: Path, recordings: Path, speaker: str, count: int, digits: int) -> Path:
    """A table of `count` recordings of `digits` test digits each, a quarter of a second apart."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        said = [draw.randrange(len(WORDS)) for _ in range(digits)]
        samples: list[np.ndarray] = []
        for digit in said:
            sound, rate = soundfile.read(recordings / f"{digit}_{speaker}_{draw.randrange(TEST)}.wav", dtype="float32")
            samples += [sound, np.zeros(rate // 4, np.float32)]
        soundfile.write(folder / f"{number}.wav", np.concatenate(samples), 8_000)
        rows.append([f"{number}.wav", " ".join(WORDS[digit] for digit in said)])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "transcription"], *rows])
    return folder / "metadata.csv"


def tables(archive: Path, folder: Path, held_out: str, own: Sequence[str], per_digit: int) -> dict[str, Path]:
    """`train/NAME` and `test/NAME`: of each of `own`, and of `others`, who are all but the one held out (tested on that one)."""
    recordings = unpack(archive, folder)
    rest = tuple(speaker for speaker in SPEAKERS if speaker != held_out)
    train, test = range(TEST, TEST + per_digit), range(TEST)
    found = {}
    for name, speakers, tested in [*((one, (one,), (one,)) for one in own), ("others", rest, (held_out,))]:
        found[f"train/{name}"] = write_metadata(folder / "train" / f"{name}.csv", recordings, speakers, train)
        found[f"test/{name}"] = write_metadata(folder / "test" / f"{name}.csv", recordings, tested, test)
    return found
