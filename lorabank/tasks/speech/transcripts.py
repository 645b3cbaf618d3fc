"""Transcripts and their timestamps: `<|0.00|> Hello.<|1.20|><|1.20|> You?<|2.00|>` ⇄ segments, cut to windows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lorabank.data.row import RowError

STAMP = re.compile(r"<\|(\d+(?:\.\d+)?)\|>")
SPECIAL = re.compile(r"<\|[^|<>]*\|>")
STEP_S = 0.02
"""Seconds between two timestamps of Whisper."""
UNSPACED = ("zh", "ja", "th", "lo", "my", "yue", "bo", "km")
"""Languages whose transcripts begin without the space that Whisper's begin with elsewhere."""


@dataclass(frozen=True)
class Segment:
    """What was said between two moments, seconds; both None where nobody noted them."""

    text: str
    start: float | None = None
    end: float | None = None


def parse(text: str) -> list[Segment]:
    """The segments of a transcript; one without times where it has no timestamps.

    A timestamp opens the segment that follows it and closes the one before; the last may stay open. Raises RowError for times
    that go backwards, text outside of segments, or other tokens of Whisper's (`<|en|>`) in the text.
    """
    if not STAMP.search(text):
        return [Segment(_plain(text))]
    pieces = STAMP.split(text)
    if pieces[0].strip():
        raise RowError("the transcript has text before its first timestamp")
    times, texts = [float(t) for t in pieces[1::2]], [_plain(t) for t in pieces[2::2]]
    if any(later < earlier for earlier, later in pairwise(times)):
        raise RowError("the transcript's timestamps go backwards")
    segments = []
    for i, said in enumerate(texts):
        if said:
            segments.append(Segment(said, times[i], times[i + 1] if i + 1 < len(times) else None))
    return segments


def _plain(text: str) -> str:
    if SPECIAL.search(text):
        raise RowError("the transcript holds one of Whisper's own tokens, such as <|en|>, as text")
    return " ".join(text.split())


def plain_text(segments: Sequence[Segment]) -> str:
    """The words alone."""
    return " ".join(segment.text for segment in segments if segment.text)


def with_times(segments: Sequence[Segment]) -> str:
    """The transcript with its timestamps, as `parse` reads it."""
    return "".join(
        f"<|{s.start:.2f}|> {s.text}" + ("" if s.end is None else f"<|{s.end:.2f}|>") if s.start is not None else s.text
        for s in segments
    )


def has_times(segments: Sequence[Segment]) -> bool:
    """Whether every segment says when it begins."""
    return bool(segments) and all(segment.start is not None for segment in segments)


def check_times(segments: Sequence[Segment], seconds: float) -> None:
    """Raise RowError where a time lies behind the recording's end (a step of rounding aside)."""
    if any(time is not None and time > seconds + STEP_S for s in segments for time in (s.start, s.end)):
        raise RowError("the transcript's timestamps go beyond the recording's end")


def windows(segments: Sequence[Segment], seconds: float, window: float) -> list[tuple[float, float, list[Segment]]]:
    """(start, end, segments with times from that start) of stretches of at most `window` seconds that break between segments.

    Raises RowError where a segment alone is longer, or has no times.
    """
    if not has_times(segments):
        raise RowError("too long for the window, and its transcript has no timestamps to split it at")
    found: list[tuple[float, float, list[Segment]]] = []
    current: list[Segment] = []
    for i, segment in enumerate(segments):
        begin = float(segment.start or 0.0)
        following = segments[i + 1].start if i + 1 < len(segments) else None
        end = segment.end if segment.end is not None else following if following is not None else seconds
        segment = Segment(segment.text, begin, end)
        if end - begin > window:
            raise RowError("a stretch between two timestamps is longer than the window")
        if current and end - float(current[0].start or 0.0) > window:
            found.append(_window(current))
            current = []
        current.append(segment)
    return [*found, _window(current)] if current else found


def _window(segments: Sequence[Segment]) -> tuple[float, float, list[Segment]]:
    first, last = float(segments[0].start or 0.0), float(segments[-1].end or 0.0)
    moved = [Segment(s.text, float(s.start or 0) - first, None if s.end is None else s.end - first) for s in segments]
    return first, last, moved
