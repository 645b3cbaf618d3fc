"""`ImageReport`: what became of the pictures of a data set, for `data_report.json` and for a short print before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorabank.data.reasons import Reason, dropped_lines, dropped_rows, gather
from lorabank.data.row import RowError
from lorabank.tasks.images.rows import ImageRow
from lorabank.wording import counted

FEW = 12
"""Classes up to which each is printed with its number of pictures."""
UNEVEN = 10
"""Times that the largest class is as large as the smallest, from which on it is said."""


@dataclass(frozen=True, kw_only=True)
class ImageReport:
    """Counts over one data set."""

    read: int
    """Pictures in the sources."""
    kept: int
    dropped: Mapping[str, Reason]
    """Why pictures were left out."""
    splits: Mapping[str, int]
    """`train`, `val`, `test` to pictures."""
    classes: Mapping[str, Mapping[str, int]]
    """Label to split to pictures."""
    smallest: str
    """Width × height of the picture with the fewest pixels."""
    largest: str
    duplicates: Reason
    """Pictures whose file is the same, byte for byte, as an earlier one's."""
    other_labels: Reason
    """Pictures of which another copy has another label."""
    in_two_splits: Mapping[str, Reason]
    """`val and train` and so on: pictures of the first that are in the second as well."""
    notes: Mapping[str, Reason] = field(default_factory=dict)
    facts: Sequence[str] = ()
    """Sentences on the sources."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few short sentences, the most important first."""
        splits = ", ".join(f"{count:,} {name}" for name, count in self.splits.items() if count)
        lines = [f"{counted(self.read, 'picture')} read, {self.kept:,} kept: {splits}"]
        lines += [*dropped_lines(self.dropped), *self.facts]
        totals = {label: sum(parts.values()) for label, parts in self.classes.items() if parts}
        if totals:
            least, most = min(totals, key=lambda k: totals[k]), max(totals, key=lambda k: totals[k])
            each = ", ".join(f"{label} {count:,}" for label, count in totals.items())
            lines.append(
                f"{counted(len(totals), 'class', 'classes')}: {each}"
                if len(totals) <= FEW
                else f"{len(totals)} classes of {totals[least]:,} ({least}) to {totals[most]:,} pictures ({most})"
            )
            if totals[most] >= UNEVEN * totals[least]:
                lines.append(
                    f"uneven classes: {most} has {counted(totals[most], 'picture')}, {least} {totals[least]:,}; see f1_macro"
                )
        lines.append(f"sizes from {self.smallest} to {self.largest} pixels")
        if self.duplicates.count:
            lines.append(f"exact duplicates: {self.duplicates.count:,} ({self.duplicates.some})")
        if self.other_labels.count:
            lines.append(f"the same picture under another label: {self.other_labels.count:,} ({self.other_labels.some})")
        for pair, reason in self.in_two_splits.items():
            lines.append(f"same picture in {pair}: {reason.count:,} ({reason.some})")
        lines += [f"{note}: {reason.count:,} ({reason.some})" for note, reason in self.notes.items()]
        return lines


def build_report(
    *,
    read: int,
    errors: Sequence[RowError],
    splits: Mapping[str, Sequence[ImageRow]],
    labels: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    notes: Mapping[str, Sequence[str]],
    facts: Sequence[str] = (),
) -> ImageReport:
    """The report over `splits` (`train`, `val`, `test`, in that order). `sizes`: width and height of every picture kept."""
    rows = [row for part in splits.values() for row in part]
    by_split = {name: Counter(row.label for row in part) for name, part in splits.items()}
    by_area = sorted(sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
    return ImageReport(
        read=read,
        kept=len(rows),
        dropped=dropped_rows(errors),
        splits={name: len(part) for name, part in splits.items()},
        classes={label: {name: counts[label] for name, counts in by_split.items() if counts[label]} for label in labels},
        smallest="{} × {}".format(*by_area[0]),
        largest="{} × {}".format(*by_area[-1]),
        duplicates=gather(_repeated(rows)),
        other_labels=gather(_other_labels(rows)),
        in_two_splits=_in_two_splits(splits),
        notes={note: gather(origins) for note, origins in notes.items() if origins},
        facts=tuple(facts),
    )


def _repeated(rows: Iterable[ImageRow]) -> Iterable[str]:
    seen: set[str] = set()
    for row in rows:
        if row.digest in seen:
            yield row.origin
        seen.add(row.digest)


def _other_labels(rows: Sequence[ImageRow]) -> Iterable[str]:
    labels: dict[str, set[str | None]] = {}
    for row in rows:
        labels.setdefault(row.digest, set()).add(row.label)
    return (row.origin for row in rows if len(labels[row.digest]) > 1)


def _in_two_splits(splits: Mapping[str, Sequence[ImageRow]]) -> dict[str, Reason]:
    digests = {name: {row.digest for row in part} for name, part in splits.items()}
    names, found = list(splits), dict[str, Reason]()
    for later in range(1, len(names)):
        for earlier in range(later):
            here, there = names[later], names[earlier]
            if origins := [row.origin for row in splits[here] if row.digest in digests[there]]:
                found[f"{here} and {there}"] = gather(origins)
    return found
