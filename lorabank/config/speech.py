"""`SpeechConfig`: what speech recognition needs to know beside a run's other settings. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorabank.config.checks import check_choice, check_fraction, check_positive, check_positive_int
from lorabank.errors import ConfigError, Setting

SPEECH_TASKS = ("transcribe", "translate")
TIMESTAMPS = ("auto", "keep", "drop")
LONG_AUDIO = ("drop", "cut", "split", "stop")
MAX_WINDOW_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """How recordings and their transcripts are read, and how text is generated from them."""

    language: str | None = None
    """Language of the transcripts, as a name or a code (`german`, `de`). Models that know many need it; rows with a column
    `language` have their own."""
    task: str = "transcribe"
    """`transcribe`, or `translate` into English."""
    timestamps: str = "auto"
    """`keep` those that transcripts have (`<|0.00|> Hello.<|1.20|>`) and refuse transcripts without; `auto`: keep them where
    there are any; `drop` them."""
    audio_column: str | None = None
    """Column of the recording: a path, bytes, or samples. None: file_name, audio, path, …, the first there is."""
    text_column: str | None = None
    """Column of the transcript. None: transcription, text, sentence, transcript, …, the first there is."""
    long_audio: str = "drop"
    """What follows where a recording is longer than `window`: `drop` and count it; `cut` the rest off, with what its timestamps
    say was spoken there; `split` it between its timestamps; or `stop` with an error that names it."""
    window: float = MAX_WINDOW_S
    """Seconds of audio that the model hears at once; shorter recordings are filled up with silence. Below 30 the encoder's
    positions are cut: much faster for short recordings, and the adapter is then for that window alone."""
    beams: int = 1
    """Beams that transcripts are generated with; 1 is greedy."""

    mask_time_prob: float = 0.0
    """SpecAugment in training: the share of a recording's frames (of 10 ms) in masked spans, such as 0.05; 0 masks none."""
    mask_time_length: int = 10
    """Frames of a span."""
    mask_feature_prob: float = 0.0
    """The share of Mel bins in masked spans; 0 masks none."""
    mask_feature_length: int = 10
    """Mel bins of a span."""

    def __post_init__(self) -> None:
        check_choice("speech.task", self.task, SPEECH_TASKS)
        check_choice("speech.timestamps", self.timestamps, TIMESTAMPS)
        check_choice("speech.long_audio", self.long_audio, LONG_AUDIO)
        check_positive_int("speech.beams", self.beams)
        check_positive("speech.window", self.window)
        for name in ("mask_time_prob", "mask_feature_prob"):
            check_fraction(f"speech.{name}", getattr(self, name))
        for name in ("mask_time_length", "mask_feature_length"):
            check_positive_int(f"speech.{name}", getattr(self, name))
        if self.window > MAX_WINDOW_S:
            raise ConfigError(Setting("speech.window"), f": at most {MAX_WINDOW_S:g} seconds, got {self.window:g}")
