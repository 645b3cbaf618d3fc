"""Transcripts as files for people: plain text, SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorabank.tasks.speech.transcripts import Segment, plain_text

LAST_S = 2.0
"""Seconds that a caption stays whose end the model didn't say, if nothing follows."""


def as_text(segments: Sequence[Segment], seconds: float) -> str:
    """The words in one line."""
    return plain_text(segments) + "\n"


def as_srt(segments: Sequence[Segment], seconds: float) -> str:
    """SubRip: numbered captions, times with a comma before the milliseconds."""
    captions = enumerate(_timed(segments, seconds), 1)
    return "".join(f"{i}\n{_clock(a, ',')} --> {_clock(b, ',')}\n{text}\n\n" for i, (a, b, text) in captions)


def as_vtt(segments: Sequence[Segment], seconds: float) -> str:
    """WebVTT (W3C): a header line, times with a point; & and < are escaped, `-->` can't stand in a caption."""
    lines = [f"{_clock(a, '.')} --> {_clock(b, '.')}\n{_escaped(text)}\n\n" for a, b, text in _timed(segments, seconds)]
    return "WEBVTT\n\n" + "".join(lines)


WRITERS: dict[str, Callable[[Sequence[Segment], float], str]] = {".txt": as_text, ".srt": as_srt, ".vtt": as_vtt}
"""Suffix to writer: (segments, the recording's seconds) → the file's text."""


def _timed(segments: Sequence[Segment], seconds: float) -> list[tuple[float, float, str]]:
    """(start, end, text); what has no time of its own gets that of its neighbours."""
    found: list[tuple[float, float, str]] = []
    for i, segment in enumerate(segments):
        start = segment.start if segment.start is not None else found[-1][1] if found else 0.0
        following = next((s.start for s in segments[i + 1 :] if s.start is not None), None)
        end = segment.end if segment.end is not None else following if following is not None else min(seconds, start + LAST_S)
        found.append((start, max(end, start), segment.text))
    return found


def _clock(seconds: float, mark: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
