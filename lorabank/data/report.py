"""`DataReport`: what became of the rows, for `data_report.json` and for a short print before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lorabank.data.reasons import Reason, dropped_lines, dropped_rows, gather
from lorabank.data.render import TokenRow
from lorabank.data.row import RowError
from lorabank.wording import counted

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens a row: nearest-rank quantiles."""

    min: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts over one data set (or several files read as one)."""

    read: int
    """Rows in the sources."""
    kept: int
    dropped: Mapping[str, Reason]
    """Why rows were left out."""
    forms: Mapping[str, int]
    """Detected form to rows."""
    splits: Mapping[str, int]
    """`train`, `val`, `test` to rows."""
    tokens: Mapping[str, int]
    """The same to tokens."""
    trained_tokens: Mapping[str, int]
    """The same to tokens with a weight above zero."""
    trained_share: float
    """Trained tokens over all tokens."""
    lengths: Lengths
    """Of whole rows, after truncation."""
    answer_lengths: Lengths
    """Trained tokens a row."""
    truncated: Reason
    """Rows cut to `max_length`."""
    duplicates: Reason
    """Rows that repeat an earlier one token for token."""
    prompts_with_several_answers: int
    """Prompts that come with more than one answer: several references, or a contradiction."""
    rows_with_several_answers: int
    """Rows with such a prompt."""
    in_two_splits: Mapping[str, Reason]
    """`val and train` and so on: rows of the first whose prompt also stands in the second."""
    notes: Mapping[str, Reason] = field(default_factory=dict)
    """Further facts worth knowing, with their rows."""
    facts: Sequence[str] = ()
    """Sentences on the sources."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few short sentences, the most important first."""
        splits = ", ".join(f"{count:,} {name}" for name, count in self.splits.items() if count)
        forms = ", ".join(self.forms)
        lines = [f"{counted(self.read, 'row')} read ({forms}), {self.kept:,} kept: {splits}"]
        lines += [*dropped_lines(self.dropped), *self.facts]
        lengths = self.lengths
        lines.append(
            f"tokens a row: {lengths.min:,} to {lengths.max:,}, half below {lengths.p50 + 1:,}, 99 % at most {lengths.p99:,}; "
            f"{100 * self.trained_share:.0f} % of all tokens are trained"
        )
        if self.truncated.count:
            lines.append(f"cut to max_length: {self.truncated.count:,} ({self.truncated.some})")
        if self.duplicates.count:
            lines.append(f"exact duplicates: {self.duplicates.count:,} ({self.duplicates.some})")
        if self.prompts_with_several_answers:
            count, rows = self.prompts_with_several_answers, self.rows_with_several_answers
            lines.append(f"{counted(count, 'prompt')} with several different answers ({counted(rows, 'row')})")
        for pair, rows in self.in_two_splits.items():
            lines.append(f"same prompt in {pair}: {counted(rows.count, 'row')} ({rows.some}); see data.group_by")
        lines += [f"{note}: {counted(rows.count, 'row')} ({rows.some})" for note, rows in self.notes.items()]
        return lines


def build_report(
    *,
    read: int,
    errors: Sequence[RowError],
    forms: Mapping[str, int],
    notes: Mapping[str, Sequence[str]],
    splits: Mapping[str, Sequence[TokenRow]],
    facts: Sequence[str] = (),
) -> DataReport:
    """The report over `splits` (`train`, `val`, `test`), in that order."""
    rows = [row for part in splits.values() for row in part]
    answers = _answers_by_prompt(rows)
    several = [prompt for prompt, counts in answers.items() if len(counts) > 1]
    trained = {name: sum(_trained(row) for row in part) for name, part in splits.items()}
    tokens = {name: sum(len(row.input_ids) for row in part) for name, part in splits.items()}
    return DataReport(
        read=read,
        kept=len(rows),
        dropped=dropped_rows(errors),
        forms=dict(forms),
        splits={name: len(part) for name, part in splits.items()},
        tokens=tokens,
        trained_tokens=trained,
        trained_share=sum(trained.values()) / max(1, sum(tokens.values())),
        lengths=_lengths([len(row.input_ids) for row in rows]),
        answer_lengths=_lengths([_trained(row) for row in rows]),
        truncated=gather(row.origin for row in rows if row.truncated),
        duplicates=gather(_repeated(rows)),
        prompts_with_several_answers=len(several),
        rows_with_several_answers=sum(answers[prompt].total() for prompt in several),
        in_two_splits=_in_two_splits(splits),
        notes={note: gather(origins) for note, origins in notes.items()},
        facts=tuple(facts),
    )


def _trained(row: TokenRow) -> int:
    return sum(1 for weight in row.weights if weight)


def _lengths(values: Sequence[int]) -> Lengths:
    ordered = sorted(values) or [0]

    def quantile(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Lengths(
        min=ordered[0],
        mean=round(sum(ordered) / len(ordered), 2),
        p50=quantile(0.5),
        p90=quantile(0.9),
        p99=quantile(0.99),
        max=ordered[-1],
    )


def _answers_by_prompt(rows: Iterable[TokenRow]) -> dict[str, Counter[str]]:
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        if row.prompt_text:
            answers.setdefault(row.prompt_text, Counter())[row.reference] += 1
    return answers


def _repeated(rows: Iterable[TokenRow]) -> Iterable[str]:
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        if row.input_ids in seen:
            yield row.origin
        seen.add(row.input_ids)


def _in_two_splits(splits: Mapping[str, Sequence[TokenRow]]) -> dict[str, Reason]:
    # Rows without a prompt (plain text) are the same if their text is.
    prompts = {name: {row.prompt_text or row.reference for row in part} for name, part in splits.items()}
    names = list(splits)
    found = {}
    for later in range(1, len(names)):
        for earlier in range(later):
            here, there = names[later], names[earlier]
            origins = [row.origin for row in splits[here] if (row.prompt_text or row.reference) in prompts[there]]
            if origins:
                found[f"{here} and {there}"] = gather(origins)
    return found
