"""What the user should look at though it is used: a transcript that looks like a missing value, samples far beyond full scale."""

from __future__ import annotations

import numpy as np

from lorabank.data.formats import MISSING_WORD, is_missing_word
from lorabank.tasks.speech.audio import Sound

LOUD = 4.0
"""Peak from which samples are hardly scaled to ±1: resampling and lossy formats overshoot by far less."""
TOO_LOUD = (
    f"samples beyond ±{LOUD:g}, where ±1 is full scale: used as they are. Whole numbers of 16 bits in a float file are to be "
    "divided by 32,768"
)


def doubts(text: str, sound: Sound) -> list[str]:
    """Sentences on one recording and what was said in it (not empty); mostly none."""
    missing = [MISSING_WORD] if is_missing_word(text) else []
    loud = [TOO_LOUD] if float(np.abs(sound.samples_S).max()) > LOUD else []
    return [*missing, *loud]
