"""What prepares a Whisper's inputs: its feature extractor and tokenizer, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorabank.errors import ModelError, first_line


def processor_of(name: str, folder: Path) -> Any:
    """The WhisperProcessor in a model's folder. Raises ModelError where a part of it is missing, or it is another model's."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    try:
        features = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
        tokenizer = WhisperTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged or missing file surfaces as one of a dozen classes of three libraries
        reason = first_line(error)
        raise ModelError(
            f"model {name!r}: its feature extractor or tokenizer can't be read ({reason}). Speech recognition needs a Whisper "
            "model with preprocessor_config.json and tokenizer.json beside its weights."
        ) from error
    return WhisperProcessor(features, tokenizer)
