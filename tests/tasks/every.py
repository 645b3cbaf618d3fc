"""A tiny model and data for every task, on disk, for tests that hold for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import transformers as hf

from lorabank.models.quiet import quiet_transformers
from tests.tasks.detection.made import coco_folder, saved_detector
from tests.tasks.diffusion.tiny import folder_of_pictures
from tests.tasks.diffusion.tiny import pipeline as image_pipeline
from tests.tasks.images.made import folder as image_folder
from tests.tasks.seq2seq.tiny import summary_rows, t5, translation_rows
from tests.tasks.speech.tiny import audio_folder, tiny_whisper, tone
from tests.tasks.synthesis.made import RATE, saved_model, tones
from tests.tasks.tiny import labelled_rows, tiny_bert
from tests.training.tiny import tiny_model, tiny_rows, tiny_tokenizer

Made = tuple[Path, Path]


def _lines(where: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file = where / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def generation(where: Path) -> Made:
    """A language model and rows of it."""
    tiny_model().save_pretrained(where / "model")
    tiny_tokenizer().save_pretrained(where / "model")
    return where / "model", _lines(where, tiny_rows(8))


def classified(where: Path) -> Made:
    """A classifier without a trained head, and pairs of texts."""
    rows = [{**row, "text_pair": "and more"} for row in labelled_rows(8)]
    return tiny_bert(where / "model"), _lines(where, rows)


def written(rows: Sequence[Mapping[str, object]]) -> Callable[[Path], Made]:
    """A T5, and these rows."""

    def make(where: Path) -> Made:
        model, tokenizer = t5()
        model.save_pretrained(where / "model")
        tokenizer.save_pretrained(where / "model")
        return where / "model", _lines(where, rows)

    return make


def heard(where: Path) -> Made:
    """A Whisper and recordings of tones, of half its rate, with times."""
    model, processor = tiny_whisper()
    model.save_pretrained(where / "model")
    processor.save_pretrained(where / "model")
    rows = [(f"{i}.wav", tone(0.5 + 0.1 * i, 300 + 200 * i, 8000), f"<|0.00|>word {i}<|0.40|>") for i in range(6)]
    return where / "model", audio_folder(where / "sounds", rows, rate=8000)


def said(where: Path) -> Made:
    """A SpeechT5 and recordings of tones."""
    rows = [(f"{i}.wav", tones(word), word) for i, word in enumerate(("aei", "oia", "eoa", "iioe"))]
    return saved_model(where / "model"), audio_folder(where / "voice", rows, rate=RATE)


def seen(where: Path) -> Made:
    """A ViT whose labels have no names, and pictures in folders of classes."""
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    with quiet_transformers():
        hf.ViTForImageClassification(config).save_pretrained(where / "model")
        hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(where / "model")
    return where / "model", image_folder(where / "pictures", each=4)


def found(where: Path) -> Made:
    """A detector and a COCO file."""
    return saved_detector(where / "model"), coco_folder(where / "coco", 6)


def drawn(where: Path) -> Made:
    """A pipeline and pictures with captions."""
    image_pipeline("sd").save_pretrained(where / "model")
    return where / "model", folder_of_pictures(where / "ink", 4, sizes=[(120, 80)])


EVERY: Mapping[str, Callable[[Path], Made]] = {
    "text-generation": generation,
    "text-classification": classified,
    "summarization": written(summary_rows(8)),
    "translation": written([{"translation": row["translation"]} for row in translation_rows(8)]),
    "text2text-generation": written(summary_rows(8)),
    "automatic-speech-recognition": heard,
    "text-to-speech": said,
    "image-classification": seen,
    "object-detection": found,
    "text-to-image": drawn,
}
"""Task → what makes (model, data) in a folder."""
