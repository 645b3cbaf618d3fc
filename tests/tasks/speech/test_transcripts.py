"""Transcripts, their timestamps, labels and subtitles."""

from __future__ import annotations

import pytest

from lorabank.config.speech import SpeechConfig
from lorabank.data.row import RowError
from lorabank.errors import ConfigError
from lorabank.tasks.speech.subtitles import as_srt, as_text, as_vtt
from lorabank.tasks.speech.transcripts import Segment, check_times, parse, plain_text, windows, with_times
from tests.tasks.speech.tiny import tiny_tokens

TIMED = "<|0.00|> Hello there.<|1.20|><|1.40|> You?<|2.00|>"


def test_timestamps_are_kept() -> None:
    assert parse(TIMED) == [Segment("Hello there.", 0.0, 1.2), Segment("You?", 1.4, 2.0)]
    assert with_times(parse(TIMED)) == TIMED
    assert plain_text(parse(TIMED)) == "Hello there. You?"
    assert parse("<|0.50|> open end") == [Segment("open end", 0.5, None)]
    assert parse("  two\n words ") == [Segment("two words")]
    assert parse("<|0.00|> a<|0.50|> b<|1.00|>") == [Segment("a", 0.0, 0.5), Segment("b", 0.5, 1.0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("before <|0.00|> after", "text before its first timestamp"),
        ("<|2.00|> a<|1.00|>", "go backwards"),
        ("<|0.00|> <|en|> a<|1.00|>", "own tokens"),
        ("hello <|endoftext|>", "own tokens"),
    ],
)
def test_what_is_no_transcript(text: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse(text)


def test_times_beyond_the_end() -> None:
    check_times(parse(TIMED), 1.99)
    with pytest.raises(RowError, match="beyond the recording's end"):
        check_times(parse(TIMED), 1.5)


def test_windows_break_between_segments() -> None:
    segments = [Segment("a", 0.0, 1.0), Segment("b", 1.5, 2.5), Segment("c", 2.5, 3.5), Segment("d", 4.0, None)]
    found = windows(segments, 5.0, 2.5)
    assert [(start, end, [s.text for s in part]) for start, end, part in found] == [
        (0.0, 2.5, ["a", "b"]),
        (2.5, 5.0, ["c", "d"]),
    ]
    assert found[1][2] == [Segment("c", 0.0, 1.0), Segment("d", 1.5, 2.5)]
    assert plain_text([s for _, _, part in found for s in part]) == plain_text(segments)
    with pytest.raises(RowError, match="no timestamps to split it at"):
        windows([Segment("a")], 5.0, 2.5)
    with pytest.raises(RowError, match="longer than the window"):
        windows([Segment("a", 0.0, 3.0)], 5.0, 2.5)


def test_labels_of_an_english_model() -> None:
    tokens = tiny_tokens()
    ids, prefix = tokens.labels(parse("Hi"), None, "transcribe")
    assert ids == (tokens.start, tokens.no_timestamps, *tokens.text_ids(" Hi"), tokens.end)
    assert prefix == 2
    ids, prefix = tokens.labels(parse("<|0.00|> Hi<|0.50|>"), "english", "transcribe")
    assert ids == (tokens.start, tokens.first_timestamp, *tokens.text_ids(" Hi"), tokens.first_timestamp + 25, tokens.end)
    assert prefix == 1
    assert tokens.segments(ids[prefix:]) == [Segment("Hi", 0.0, 0.5)]
    with pytest.raises(ConfigError, match="expected english"):
        tokens.labels(parse("Hi"), "german", "transcribe")
    with pytest.raises(RowError, match="more tokens than the decoder has positions"):
        tokens.labels(parse("x" * 80), None, "transcribe")


def test_labels_of_a_model_with_languages() -> None:
    tokens = tiny_tokens(multilingual=True)
    german, transcribe = tokens.languages["de"], tokens.tasks["transcribe"]
    for language in ("de", "German"):
        ids, prefix = tokens.labels(parse("Ja"), language, "transcribe")
        assert ids[:prefix] == (tokens.start, german, transcribe, tokens.no_timestamps)
    assert tokens.labels(parse("好"), "zh", "transcribe")[0][4:-1] == tuple(tokens.text_ids("好"))  # no space before it
    with pytest.raises(ConfigError, match="knows many languages"):
        tokens.labels(parse("Ja"), None, "transcribe")
    with pytest.raises(ConfigError, match=r"did you mean 'german'\?"):
        tiny_tokens(SpeechConfig(language="germn"), multilingual=True)
    with pytest.raises(ConfigError, match="can't translate"):
        tiny_tokens(SpeechConfig(task="translate"))


def test_generated_ids_lose_no_word() -> None:
    tokens = tiny_tokens()
    t, text = tokens.first_timestamp, tokens.text_ids
    ids = [*text(" a"), t + 10, t + 10, *text(" b"), t + 20, t + 30, *text(" c"), tokens.end, tokens.end]
    assert tokens.segments(ids) == [Segment("a", None, 0.2), Segment("b", 0.2, 0.4), Segment("c", 0.6, None)]
    assert tokens.text(ids) == "a b c"


def test_subtitles() -> None:
    segments = [Segment("A & B", 0.0, 1.25), Segment("c", 3661.5, None)]
    assert as_srt(segments, 4000.0) == ("1\n00:00:00,000 --> 00:00:01,250\nA & B\n\n2\n01:01:01,500 --> 01:01:03,500\nc\n\n")
    assert as_vtt(segments, 3662.0) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nA &amp; B\n\n01:01:01.500 --> 01:01:02.000\nc\n\n"
    )
    assert as_text(segments, 3662.0) == "A & B c\n"
    assert as_srt([Segment("all")], 1.0) == "1\n00:00:00,000 --> 00:00:01,000\nall\n\n"
