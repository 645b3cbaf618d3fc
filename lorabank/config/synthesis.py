"""`SynthesisConfig`: what speech synthesis is told beside a run's other settings. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorabank.config.checks import check_fraction, check_positive


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How recordings, texts and speakers are read, and how speech is made of spectra."""

    audio_column: str | None = None
    """Column of the recording. None: file_name, audio, path, …, the first there is."""
    text_column: str | None = None
    """Column of what is said. None: transcription, text, sentence, …, the first there is."""
    speaker_column: str = "speaker_embedding"
    """Column of the speaker's embedding, a list of numbers as long as the model's; zeros where there is no such column."""
    max_seconds: float = 20.0
    """Recordings that are longer are bad rows (`data.bad_rows`)."""
    vocoder: str | None = None
    """Folder or hub id of a SpeechT5HifiGan. None: Griffin-Lim, which needs no weights and sounds metallic."""
    stop: float = 0.5
    """Chance of the end at which speech ends."""

    def __post_init__(self) -> None:
        check_positive("synthesis.max_seconds", self.max_seconds)
        check_fraction("synthesis.stop", self.stop)
