"""Reading of rows for every task, and data sets as the hub has them: columns with features, pictures and recordings as bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from lorabank.config.classification import ClassificationConfig
from lorabank.config.detection import DetectionConfig
from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.images import ImagesConfig
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig
from lorabank.data.prepare import prepare
from lorabank.tasks.detection.prepare import prepare as detect
from lorabank.tasks.diffusion.rows import prepare as draw
from lorabank.tasks.images.prepare import prepare_images
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.rows import PixelStore
from lorabank.tasks.seq2seq.rows import prepare_pairs
from lorabank.tasks.speech.audio import as_wav
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.synthesis.rows import Limits
from lorabank.tasks.synthesis.rows import prepare as say
from lorabank.tasks.text_classification.prepare import prepare_texts
from tests.tasks.detection.made import table_rows
from tests.tasks.diffusion.tiny import picture as smooth
from tests.tasks.images.made import as_bytes, picture
from tests.tasks.seq2seq.tiny import summary_rows, t5
from tests.tasks.speech.tiny import RATE, WINDOW_S, tiny_tokens, tone
from tests.tasks.synthesis.made import RATE as SAID_RATE
from tests.tasks.synthesis.made import tiny_processor, tones
from tests.tasks.tiny import labelled_rows
from tests.training.tiny import tiny_rows, tiny_tokenizer

Read = Callable[[DataConfig, Path, Any], Any]


@dataclass(frozen=True)
class Reading:
    """Of one task."""

    rows: Callable[[int, int], datasets.Dataset]
    """(count, seed) → a data set; of another seed without a row in common."""
    read: Read
    """(settings, a folder to work in, training rows or None) → rows in splits."""
    shown: Callable[[Any], str] = lambda row: row.reference
    """What is learned of a row, for people."""


def _classified(data: DataConfig, where: Path, train: Any) -> Any:
    images = ImagesConfig(image_size=16)
    return prepare_images(data, images, PixelStore(read_off(plain_processor(images), images), 1e9), seed=0, train=train)


def _found(data: DataConfig, where: Path, train: Any) -> Any:
    def keep(digest: str, upright: bool, image: Image.Image) -> None: ...

    return detect(data, DetectionConfig(), seed=0, train=train, val=None, keep=keep)


def _drawn(data: DataConfig, where: Path, train: Any) -> Any:
    config = DiffusionConfig(resolution=32, bucket_step=8, min_side=16)
    return draw(data, config, step=8, seed=0, train=train, val=None)


def _heard(data: DataConfig, where: Path, train: Any) -> Any:
    return prepare_speech(data, SpeechConfig(window=WINDOW_S), tiny_tokens(), RATE, seed=0, train=train)


def _said(data: DataConfig, where: Path, train: Any) -> Any:
    limits = Limits(speaker=4, text=40, reduction=2)
    return say(data, SynthesisConfig(), tiny_processor(where / "spm"), limits, seed=0, train=train, val=None)


def _written(data: DataConfig, where: Path, train: Any) -> Any:
    return prepare_pairs(data, Seq2SeqConfig(), t5()[1], seed=0, train=train)


def _labelled(data: DataConfig, where: Path, train: Any) -> Any:
    return prepare_texts(data, ClassificationConfig(), tiny_tokenizer(None), seed=0, train=train)


def _generated(data: DataConfig, where: Path, train: Any) -> Any:
    return prepare(data, tiny_tokenizer(), seed=0, train=train)


def _png(image: Image.Image) -> dict[str, Any]:
    return {"bytes": as_bytes(image), "path": None}


def _labels(count: int, seed: int) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = labelled_rows(count, start=1000 * seed)
    return datasets.Dataset.from_list(rows, features=features)


def _pictures(count: int, seed: int) -> datasets.Dataset:
    names = ["red", "blue"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"image": _png(picture(names[i % 2], 1000 * seed + i)), "label": i % 2} for i in range(count)]
    return datasets.Dataset.from_list(rows, features=features)


def _boxes(count: int, seed: int) -> datasets.Dataset:
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": _Categories}
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    names = ["red", "green"]
    rows = table_rows(count, seed=seed + 1)
    for row in rows:
        row["image"] = _png(row["image"])
        row["objects"]["category"] = list(map(names.index, row["objects"]["category"]))
    return datasets.Dataset.from_list([{"image": row["image"], "objects": row["objects"]} for row in rows], features=features)


_Categories = datasets.List(datasets.ClassLabel(names=["red", "green"]))


def _captions(count: int, seed: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": _png(smooth(1000 * seed + i)), "text": f"cat {seed} {i}"} for i in range(count)]
    return datasets.Dataset.from_list(rows, features=features)


def _sounds(make: Callable[[int, int], tuple[bytes, str]]) -> Callable[[int, int], datasets.Dataset]:
    def rows(count: int, seed: int) -> datasets.Dataset:
        made = [make(i, seed) for i in range(count)]
        found = [{"audio": {"bytes": sound, "path": f"{i}.wav"}, "text": text} for i, (sound, text) in enumerate(made)]
        return datasets.Dataset.from_list(found).cast_column("audio", datasets.Audio())

    return rows


def _noted(number: int, seed: int) -> tuple[bytes, str]:
    return as_wav(tone(0.3, 300.0 + 50 * number, seed=1000 * seed + number), RATE), f"tone {number}"


def _spoken(number: int, seed: int) -> tuple[bytes, str]:
    word = "aeio"[number % 4] + "aeio"[(number + seed) % 4] + "ae"
    return as_wav(tones(word) * (1 - 0.01 * number - 0.2 * seed), SAID_RATE), word


def _plain(make: Callable[[int, int], list[dict[str, Any]]]) -> Callable[[int, int], datasets.Dataset]:
    return lambda count, seed: datasets.Dataset.from_list(make(count, seed))


READINGS: Mapping[str, Reading] = {
    "text-generation": Reading(_plain(lambda count, seed: tiny_rows(count, f"name {seed}")), _generated),
    "text-classification": Reading(_labels, _labelled),
    "summarization": Reading(_plain(lambda count, seed: summary_rows(count + 20 * seed)[20 * seed :]), _written),
    "image-classification": Reading(_pictures, _classified),
    "object-detection": Reading(_boxes, _found, lambda row: " ".join(sorted({box.label for box in row.boxes}))),
    "text-to-image": Reading(_captions, _drawn, lambda row: row.caption),
    "automatic-speech-recognition": Reading(_sounds(_noted), _heard),
    "text-to-speech": Reading(_sounds(_spoken), _said, lambda row: row.text),
}
"""Task → how its rows are read."""


def parquet(rows: datasets.Dataset, file: Path) -> None:
    """Write a file as the hub has it: features in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    rows.to_parquet(stream)
    file.write_bytes(stream.getvalue())


def repository(folder: Path, reading: Reading, files: Mapping[str, int]) -> Path:
    """A folder as a data set of the hub is downloaded: a file of so many rows each, and what describes them."""
    for seed, (name, count) in enumerate(files.items()):
        parquet(reading.rows(count, seed), folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}\n')
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "train.json").write_text("{}\n")
    return folder
