"""`SpeechReport`: what became of the recordings, for `data_report.json` and for a short print before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorabank.data.report import Reason, gather
from lorabank.data.row import RowError
from lorabank.tasks.speech.rows import SpeechRow


@dataclass(frozen=True, kw_only=True)
class SpeechReport:
    """Counts over one data set."""

    read: int
    """Recordings in the sources."""
    kept: int
    """Rows made of them: windows, where long recordings are split."""
    dropped: Mapping[str, Reason]
    """Why recordings were left out, and the first of them by file."""
    splits: Mapping[str, int]
    """`train`, `val`, `test` to rows."""
    seconds: Mapping[str, float]
    """The same to seconds of audio."""
    longest: float
    """Seconds of the longest row."""
    tokens: Mapping[str, int]
    """The same to learned tokens."""
    timed: int
    """Rows whose transcripts have timestamps."""
    duplicates: Reason
    """Rows that repeat an earlier one's samples."""
    in_two_splits: Mapping[str, Reason]
    """`val and train` and so on: rows of the first whose samples are also in the second."""
    notes: Mapping[str, Reason]
    """Further facts worth knowing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few short sentences, the most important first."""
        splits = ", ".join(f"{count:,} {name} ({_clock(self.seconds[name])})" for name, count in self.splits.items() if count)
        lines = [f"{self.read:,} recordings read, {self.kept:,} rows kept: {splits}"]
        lines += [f"dropped {rows.count:,}: {reason} ({_some(rows)})" for reason, rows in self.dropped.items()]
        tokens, seconds = sum(self.tokens.values()), sum(self.seconds.values())
        timed = f"; {self.timed:,} rows have timestamps" if self.timed else ""
        lines.append(f"up to {self.longest:.1f} s a row; {tokens / max(1e-9, seconds):.1f} tokens a second are learned{timed}")
        if self.duplicates.count:
            lines.append(f"the same samples as an earlier row: {self.duplicates.count:,} ({_some(self.duplicates)})")
        lines += [
            f"same recording in {pair}: {r.count:,} ({_some(r)}); see data.group_by" for pair, r in self.in_two_splits.items()
        ]
        lines += [f"{note}: {rows.count:,} recordings ({_some(rows)})" for note, rows in self.notes.items()]
        return lines

    def __rich__(self) -> object:
        """The lines as a bare rich table, warnings in yellow."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for number, line in enumerate(self.lines()):
            warned = line.startswith(("dropped", "same recording in")) or line.split(":")[0] in self.notes
            table.add_row(Text("data" if number == 0 else "", style="bold"), Text(line, style="yellow" if warned else ""))
        return table


def build_report(
    *,
    read: int,
    errors: Sequence[tuple[RowError, str]],
    notes: Mapping[str, Sequence[str]],
    splits: Mapping[str, Sequence[SpeechRow]],
) -> SpeechReport:
    """The report over `splits`, in that order."""
    rows = [row for part in splits.values() for row in part]
    reasons: dict[str, list[str]] = {}
    for error, name in errors:
        reasons.setdefault(error.reason, []).append(name if name == error.origin else f"{error.origin}, {name}")
    return SpeechReport(
        read=read,
        kept=len(rows),
        dropped={reason: gather(names) for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))},
        splits={name: len(part) for name, part in splits.items()},
        seconds={name: round(sum(row.seconds for row in part), 3) for name, part in splits.items()},
        longest=round(max((row.seconds for row in rows), default=0.0), 3),
        tokens={name: sum(row.tokens for row in part) for name, part in splits.items()},
        timed=sum(row.timed for row in rows),
        duplicates=gather(_repeated(rows)),
        in_two_splits=_in_two_splits(splits),
        notes={note: gather(names) for note, names in notes.items()},
    )


def _repeated(rows: Sequence[SpeechRow]) -> list[str]:
    seen: set[str] = set()
    found = []
    for row in rows:
        if row.digest in seen:
            found.append(row.name)
        seen.add(row.digest)
    return found


def _in_two_splits(splits: Mapping[str, Sequence[SpeechRow]]) -> dict[str, Reason]:
    names = list(splits)
    digests = {name: {row.digest for row in part} for name, part in splits.items()}
    found = {}
    for later in range(1, len(names)):
        for earlier in range(later):
            shared = [row.name for row in splits[names[later]] if row.digest in digests[names[earlier]]]
            if shared:
                found[f"{names[later]} and {names[earlier]}"] = gather(shared)
    return found


def _some(reason: Reason) -> str:
    return "; ".join(reason.origins) + ("; …" if reason.count > len(reason.origins) else "")


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
