"""Kinds of work: their names, and the sections of settings that they have beside those of every run."""

from __future__ import annotations

from collections.abc import Mapping

from lorabank.config.classification import ClassificationConfig
from lorabank.config.images import ImagesConfig
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.speech import SpeechConfig

DEFAULT_TASK = "text-generation"
TASKS = (
    DEFAULT_TASK,
    "text-classification",
    "summarization",
    "translation",
    "text2text-generation",
    "image-classification",
    "automatic-speech-recognition",
)
"""By the names of transformers' pipelines."""
TASK_SECTIONS: Mapping[str, type] = {
    "classification": ClassificationConfig,
    "seq2seq": Seq2SeqConfig,
    "images": ImagesConfig,
    "speech": SpeechConfig,
}
"""Section of a configuration file to its settings; each is a field of `TrainConfig` too."""
