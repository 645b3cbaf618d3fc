"""Error rates by jiwer, raw and normalised by Whisper's rules."""

from __future__ import annotations

import io
import sys

import pytest
import soundfile

from lorabank.errors import ConfigError, DataError, MissingExtraError
from lorabank.tasks.speech.audio import load_sound
from lorabank.tasks.speech.scores import METRICS, check_metrics, error_rates
from tests.tasks.speech.tiny import tone


def test_rates_are_over_all_words_of_the_set() -> None:
    rates = error_rates(["a b c", "d"], ["a x c", "d"], ["en", "en"])
    assert set(rates) == set(METRICS)
    assert rates["wer"] == pytest.approx(1 / 4)  # not the mean of 1/3 and 0
    assert rates["cer"] == pytest.approx(1 / 6)


def test_english_is_normalised_by_case_marks_and_numbers() -> None:
    rates = error_rates(["Mr. Smith has eight cats, don't you?"], ["mister smith has 8 cats do not you"], ["en"])
    assert rates["wer_normalized"] == rates["cer_normalized"] == 0
    assert rates["wer"] > 0.5
    assert error_rates(["colour"], ["color"], ["en"], {"colour": "color"})["wer_normalized"] == 0
    assert error_rates(["colour"], ["color"], ["en"])["wer_normalized"] == 1


def test_other_languages_lose_case_and_marks_only() -> None:
    rates = error_rates(["Acht, ja!", "eight"], ["acht ja", "8"], ["de", "en"])
    assert rates["wer_normalized"] == 0
    assert error_rates(["acht"], ["8"], ["de"])["wer_normalized"] == 1


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="no transcripts"):
        error_rates([], [], [])
    with pytest.raises(DataError, match="empty once normalised"):
        error_rates(["um"], ["a"], ["en"])
    assert error_rates(["um", "a b"], ["c", "a b"], ["en", "en"])["wer_normalized"] == pytest.approx(1 / 2)


def test_unknown_metrics() -> None:
    check_metrics(["loss", "wer", "cer_normalized"])
    with pytest.raises(ConfigError, match=r"got 'wre' \(did you mean 'wer'\?\)"):
        check_metrics(["wre"])


@pytest.mark.parametrize("library", ["jiwer", "soundfile", "soxr"])
def test_a_library_that_is_missing_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    sound = io.BytesIO()
    if library != "soundfile":
        soundfile.write(sound, tone(0.1, 440, 8_000), 8_000, format="WAV")
    with pytest.raises(MissingExtraError, match=rf"'{library}', which isn't installed: pip install 'lorabank\[speech\]'"):
        check_metrics(["wer"])
        load_sound(sound.getvalue(), 16_000)
