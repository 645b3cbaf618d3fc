"""What a run folder has of a classifier's held-out rows: scores a label, the table and picture of confusions, the worst rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabank.errors import DataError
from lorabank.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, LabelSet
from lorabank.tasks.text_classification.metrics import predicted
from lorabank.tasks.text_classification.rows import ClassRow
from lorabank.training.markdown import cell
from lorabank.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

WORST = 20
"""Rows that are shown of those that were wrong."""
MOST_CELLS = 30
"""Labels of which a picture still shows each; of more the most confused ones."""
LONGEST_TEXT = 300
"""Characters of a text in a table."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One adapter's outputs for its held-out rows: N rows, K outputs."""

    labels: LabelSet
    rows: Sequence[ClassRow]
    """Each with a label."""
    outputs_NK: NDArray[np.float64]
    losses_N: NDArray[np.float64]

    @property
    def probabilities_NK(self) -> NDArray[np.float64]:
        """Of each label; of a regression the number itself."""
        return probabilities(self.outputs_NK, self.labels)


def probabilities(outputs_NK: NDArray[np.float64], labels: LabelSet) -> NDArray[np.float64]:
    """Softmax over the labels, a sigmoid each where a row may have several, a regression's outputs as they are."""
    if labels.kind == REGRESSION:
        return outputs_NK
    if labels.kind == MULTI:
        return 1 / (1 + np.exp(-np.clip(outputs_NK, -500, 500)))
    raised = np.exp(outputs_NK - outputs_NK.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _target(row: ClassRow, labels: LabelSet) -> int | float | tuple[float, ...]:
    if row.label is None:
        raise DataError(f"{row.origin}: the row has no label")
    return labels.target(row.label)


def decided(outputs_NK: NDArray[np.float64], labels: LabelSet) -> list[str | list[str] | float]:
    """Each row's answer as a person reads it: a label's name, a list of them, or the number."""
    found = predicted(outputs_NK, labels)
    if labels.kind == SINGLE:
        return [labels.names[int(i)] for i in found]
    if labels.kind == MULTI:
        return [[name for name, on in zip(labels.names, row, strict=True) if on] for row in found]
    return [float(value) for value in found]


def confusion(outcome: Outcome) -> NDArray[np.int64]:
    """(K, K) counts: row the label that is right, column the one that was predicted."""
    counts = np.zeros((outcome.labels.outputs,) * 2, dtype=np.int64)
    targets = np.array([_target(row, outcome.labels) for row in outcome.rows], dtype=np.int64)
    np.add.at(counts, (targets, predicted(outcome.outputs_NK, outcome.labels).astype(np.int64)), 1)
    return counts


def label_table(outcome: Outcome) -> list[dict[str, Any]]:
    """A row a label: `label`, `rows`, `precision`, `recall`, `f1` (None where undefined), in the head's order."""
    guesses = predicted(outcome.outputs_NK, outcome.labels)
    targets = np.array([_target(row, outcome.labels) for row in outcome.rows], dtype=np.float64)
    if outcome.labels.kind == SINGLE:
        eye = np.eye(outcome.labels.outputs)
        guesses, targets = eye[guesses.astype(np.int64)], eye[targets.astype(np.int64)]
    table = []
    for i, name in enumerate(outcome.labels.names):
        hits = float((guesses[:, i] * targets[:, i]).sum())
        said, there = float(guesses[:, i].sum()), float(targets[:, i].sum())
        precision, recall = hits / said if said else None, hits / there if there else None
        f1 = 2 * hits / (said + there) if there else None
        table.append({"label": name, "rows": int(there), "precision": precision, "recall": recall, "f1": f1})
    return table


def worst_rows(outcome: Outcome, count: int = WORST) -> list[dict[str, Any]]:
    """The rows that are answered wrongly (of a regression: all), those with the highest loss first."""
    answers = decided(outcome.outputs_NK, outcome.labels)
    found: list[dict[str, Any]] = []
    for i in np.argsort(-outcome.losses_N, kind="stable"):
        row, answer = outcome.rows[i], answers[i]
        if outcome.labels.kind != REGRESSION and _same(row.label, answer):
            continue
        entry: dict[str, Any] = {"row": row.origin, "loss": round(float(outcome.losses_N[i]), 4), "label": row.label}
        entry["predicted"] = round(answer, 4) if isinstance(answer, float) else answer
        if outcome.labels.kind == SINGLE:
            entry["probability"] = round(float(outcome.probabilities_NK[i].max()), 4)
        entry["text"] = row.source.text
        found.append(entry | ({} if row.source.pair is None else {"text_pair": row.source.pair}))
        if len(found) == count:
            break
    return found


def _same(label: object, answer: object) -> bool:
    wanted = set(label) if isinstance(label, tuple) else {label}
    return wanted == (set(answer) if isinstance(answer, list) else {answer})


def page(name: str, outcome: Outcome, scores: Mapping[str, float]) -> str:
    """A Markdown page about one adapter: its scores, a table of labels or of numbers, and the worst rows."""
    lines = [f"# {name}: {counted(len(outcome.rows), 'held-out row')}", ""]
    lines += [", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()), ""]
    if outcome.labels.kind != REGRESSION:
        lines += ["| label | rows | precision | recall | F1 |", "|---|---|---|---|---|"]
        for row in label_table(outcome):
            cells = [_cell(row["label"]), str(row["rows"]), *(_share(row[key]) for key in ("precision", "recall", "f1"))]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if outcome.labels.kind == SINGLE:
        lines += ["What was taken for what, most often first:", "", "| is | was taken for | rows |", "|---|---|---|"]
        lines += [f"| {_cell(one)} | {_cell(other)} | {count} |" for one, other, count in confused(outcome)] or ["| – | – | 0 |"]
        lines.append("")
    worst = worst_rows(outcome)
    kind = "furthest off" if outcome.labels.kind == REGRESSION else "wrong, highest loss first"
    lines += [f"Rows {kind}:", "", "| loss | is | predicted | text | row |", "|---|---|---|---|---|"]
    for row in worst:
        text = row["text"] if "text_pair" not in row else f"{row['text']} ‖ {row['text_pair']}"
        cells = [f"{row['loss']:.3f}", _cell(row["label"]), _cell(row["predicted"]), _cell(text), _cell(row["row"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def confused(outcome: Outcome, count: int = 10) -> list[tuple[str, str, int]]:
    """(right label, predicted label, rows) of the most frequent mistakes."""
    counts = confusion(outcome)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:count]
    names = outcome.labels.names
    found = [(int(i) // len(names), int(i) % len(names)) for i in order]
    return [(names[i], names[j], int(counts[i, j])) for i, j in found if counts[i, j]]


def _cell(value: object) -> str:
    text = cell(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def picture(outcome: Outcome, title: str, path: str | Path) -> Path:
    """A picture of the held-out rows: the confusions of labels, or predicted against given numbers; returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(outcome.labels.outputs, MOST_CELLS)
    size = 5.0 if outcome.labels.kind == REGRESSION else max(4.2, 1.8 + 0.42 * side)
    figure = Figure(figsize=(size, size * 0.92), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    if outcome.labels.kind == SINGLE:
        _draw_confusion(axes, outcome)
    elif outcome.labels.kind == MULTI:
        _draw_bars(axes, outcome)
    else:
        _draw_numbers(axes, outcome)
    figure.savefig(path)
    return Path(path)


def _draw_confusion(axes: Axes, outcome: Outcome) -> None:
    """Shares of each right label's rows, with the counts in the cells; of many labels the most confused ones."""
    counts, names = confusion(outcome), outcome.labels.names
    if len(names) > MOST_CELLS:
        wrong = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
        chosen = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CELLS])
        counts, names = counts[np.ix_(chosen, chosen)], [names[i] for i in chosen]
        axes.set_title(f"{axes.get_title()}: the {MOST_CELLS} labels with most mistakes", fontsize=10)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts > 0):
        axes.text(
            j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "#222222"
        )
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), short, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")


def _draw_bars(axes: Axes, outcome: Outcome) -> None:
    """F1 of each label, the rarest last."""
    table = sorted(label_table(outcome), key=lambda row: -row["rows"])[:MOST_CELLS]
    axes.barh(range(len(table)), [row["f1"] or 0.0 for row in table], color="#0072B2")
    axes.set_yticks(range(len(table)), [f"{row['label']} ({row['rows']})" for row in table], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1 (in brackets: rows)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_numbers(axes: Axes, outcome: Outcome) -> None:
    """A point a row, and the line on which all of them should lie."""
    targets = np.array([_target(row, outcome.labels) for row in outcome.rows], dtype=np.float64)
    axes.scatter(targets, outcome.outputs_NK[:, 0], s=9, alpha=0.5, color="#0072B2", linewidths=0)
    ends = [min(targets.min(), outcome.outputs_NK.min()), max(targets.max(), outcome.outputs_NK.max())]
    axes.plot(ends, ends, color="#555555", linewidth=1, linestyle=":")
    axes.set_xlabel("right")
    axes.set_ylabel("predicted")
    axes.spines[["top", "right"]].set_visible(False)
