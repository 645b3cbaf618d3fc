"""`LabelReport`: what became of the rows and their labels, for `data_report.json` and for a short print before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lorabank.data.report import MAX_ORIGINS, Reason, gather
from lorabank.data.row import RowError
from lorabank.tasks.text_classification.labels import REGRESSION, LabelSet, names_in, shown
from lorabank.tasks.text_classification.rows import ClassRow

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_LABELS = 8


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """Counts over one data set."""

    read: int
    """Rows in the sources."""
    kept: int
    columns: Mapping[str, str | None]
    """`text`, `text_pair` and `label` to the columns that they were read from."""
    problem_type: str
    labels: Mapping[str, Mapping[str, int]]
    """Split to label to rows; of a regression empty."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of a regression: `min`, `mean` and `max` of the training rows' numbers."""
    dropped: Mapping[str, Reason] = field(default_factory=dict)
    """Why rows were left out."""
    splits: Mapping[str, int] = field(default_factory=dict)
    longest: int = 0
    """Tokens of the longest row, after truncation."""
    truncated: Reason = field(default_factory=lambda: gather(()))
    """Rows cut to `max_length`."""
    contradictions: Reason = field(default_factory=lambda: gather(()))
    """Rows whose text came earlier with another label."""
    notes: Mapping[str, Reason] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few short sentences, the most important first."""
        splits = ", ".join(f"{count:,} {name}" for name, count in self.splits.items() if count)
        used = ", ".join(f"{part}: {name}" for part, name in self.columns.items() if name is not None)
        lines = [f"{self.read:,} rows read ({used}), {self.kept:,} kept: {splits}", self._labels_line()]
        if unlearned := [name for name, count in self.labels["train"].items() if not count]:
            lines.append(f"labels without a training row, never predicted rightly: {shown(unlearned)}")
        for reason, rows in self.dropped.items():
            lines.append(f"dropped {rows.count:,}: {reason} ({_some(rows)})")
        if self.truncated.count:
            lines.append(f"cut to max_length: {self.truncated.count:,} ({_some(self.truncated)})")
        if self.contradictions.count:
            rows = self.contradictions
            lines.append(f"same text, another label: {rows.count:,} rows ({_some(rows)})")
        return [*lines, *(f"{note}: {rows.count:,} rows ({_some(rows)})" for note, rows in self.notes.items())]

    def _labels_line(self) -> str:
        if self.problem_type == REGRESSION:
            return "numbers from {min:g} to {max:g}, mean {mean:.3g}".format(**self.numbers)
        counts = self.labels["train"]
        common = sorted(counts.items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} {count:,}" for name, count in common[:SHOWN_LABELS])
        more = f", … and {len(common) - SHOWN_LABELS} rarer ones" if len(common) > SHOWN_LABELS else ""
        return (
            f"{len(counts)} labels{' (any number of them a row)' if self.problem_type != 'single_label' else ''}: {named}{more}"
        )

    def __rich__(self) -> Table:
        """The lines of the report as a bare rich table, warnings in yellow."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        warned = ("dropped", "same text", "cut to", "labels without")
        for number, line in enumerate(self.lines()):
            style = "yellow" if line.startswith(warned) or line.split(":")[0] in self.notes else ""
            table.add_row(Text("data" if number == 0 else "", style="bold"), Text(line, style=style))
        return table


def _some(reason: Reason) -> str:
    return ", ".join(reason.origins) + (", …" if reason.count > MAX_ORIGINS else "")


def build_report(
    *,
    read: int,
    columns: Mapping[str, str | None],
    labels: LabelSet,
    errors: Sequence[RowError],
    splits: Mapping[str, Sequence[ClassRow]],
    notes: Mapping[str, Sequence[str]],
) -> LabelReport:
    """The report over `splits`, in that order."""
    rows = [row for part in splits.values() for row in part]
    reasons: dict[str, list[str]] = {}
    for error in errors:
        reasons.setdefault(error.reason, []).append(error.origin)
    numbers = [float(row.target) for row in splits["train"] if labels.kind == REGRESSION and isinstance(row.target, int | float)]
    return LabelReport(
        read=read,
        kept=len(rows),
        columns=columns,
        problem_type=labels.kind,
        labels={name: label_counts(part, labels) for name, part in splits.items()},
        numbers={"min": min(numbers), "mean": sum(numbers) / len(numbers), "max": max(numbers)} if numbers else {},
        dropped={reason: gather(origins) for reason, origins in sorted(reasons.items(), key=lambda item: -len(item[1]))},
        splits={name: len(part) for name, part in splits.items()},
        longest=max((len(row.input_ids) for row in rows), default=0),
        truncated=gather(row.origin for row in rows if row.truncated),
        contradictions=gather(_contradictions(rows)),
        notes={note: gather(origins) for note, origins in notes.items() if origins},
    )


def label_counts(rows: Sequence[ClassRow], labels: LabelSet) -> dict[str, int]:
    """Rows of each label, in the head's order; none for a regression."""
    if labels.kind == REGRESSION:
        return {}
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(names_in(row.source.label))
    return {name: counts[name] for name in labels.names}


def _contradictions(rows: Sequence[ClassRow]) -> list[str]:
    seen: dict[str, Any] = {}
    return [row.origin for row in rows if seen.setdefault(row.source.key, row.target) != row.target]
