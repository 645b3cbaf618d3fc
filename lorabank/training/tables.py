"""The tables of a run as rich renderables: the plan, the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorabank.training import human
from lorabank.training.base_rows import is_base

if TYPE_CHECKING:
    from rich.table import Table

    from lorabank.training.events import RunPlan

LOWER_IS_BETTER = ("loss", "perplexity", "wer", "cer", "mae", "mse", "rmse")
"""Metrics, or the beginnings of their names (`wer_normalised`), of which less is better."""


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.split("_")[0] in LOWER_IS_BETTER


def new_table() -> Table:
    """Our one look: a line under the head, no frame."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        header_style="bold",
    )


def plan_table(plan: RunPlan, *, wide: bool = True) -> Table:
    """A row an adapter: what it is and how it will be trained. Not `wide`: what fits into 80 columns."""
    table = new_table()
    table.add_column("adapter", style="cyan", no_wrap=True)
    heads = ["rank", "layers", "parameters", "of base", "rows", "held out", "steps", "learning rate"]
    packed = ["packed into"] if any(item.packed_rows for item in plan.adapters) else []
    heads = [*heads[:5], *packed, *heads[5:]]
    for name in heads if wide else ["rank", "params", "of base", "rows", *packed, "steps", "lr"]:
        table.add_column(name, justify="right", no_wrap=True)
    for item in plan.adapters:
        cells = {
            "rank": str(item.rank),
            "layers": str(item.layers),
            "params": human.count(item.parameters),
            "of base": human.share(item.parameters, plan.base_parameters),
            "rows": f"{item.train_rows:,}",
            **{name: _packed(item.packed_rows) for name in packed},
            "held out": f"{item.val_rows:,}",
            "steps": f"{item.total_steps:,}",
            "lr": human.rate(item.learning_rate),
        }
        table.add_row(item.name, *(text for name, text in cells.items() if wide or name not in ("layers", "held out")))
    return table


def _packed(rows: tuple[int, float] | None) -> str:
    return "" if rows is None else f"{rows[0]:,} ({math.floor(100 * rows[1])} % full)"


def metrics_table(
    scores: Mapping[str, Mapping[str, float]], extra: Mapping[str, Mapping[str, str]] | None = None, *, width: int | None = None
) -> Table:
    """A row a model, a column a metric; the best of a column is bold, unless rows differ. `extra`: columns of text by model.

    Where that is wider than `width` characters, a column a model and a row a metric, so that no number is cut off.
    """
    from rich.cells import cell_len
    from rich.markup import render

    metrics = list(dict.fromkeys(name for row in scores.values() for name in row))
    texts = list(dict.fromkeys(name for row in (extra or {}).values() for name in row))
    heads = [*(name.replace("_", " ") for name in metrics), *texts]
    rows = {model: _cells(model, scores, metrics, texts, extra or {}) for model in scores}
    columns = list(zip(heads, *rows.values(), strict=True))  # each metric's head and texts
    needed = max(map(len, rows), default=0) + sum(max(cell_len(render(text).plain) for text in column) + 2 for column in columns)
    table = new_table()
    table.add_column("", style="cyan", no_wrap=True)
    if width is not None and needed > width:
        for model in rows:
            table.add_column(model, justify="right", overflow="fold")
        for column in columns:
            table.add_row(*column)
        return table
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i < len(metrics) else "left", no_wrap=i < len(metrics))
    for model, cells in rows.items():
        table.add_row(model, *cells)
    return table


def _cells(
    model: str,
    scores: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str],
    texts: Sequence[str],
    extra: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """One model's metrics and texts."""
    # what was scored on different rows can't be compared
    comparable = len(scores) > 1 and sum(map(is_base, scores)) < 2
    best = {name: _best(name, scores) if comparable else None for name in metrics}
    cells = []
    for name in metrics:
        value = scores[model].get(name)
        text = "–" if value is None else human.score(name, value)
        cells.append(f"[bold green]{text}[/]" if value is not None and value == best[name] else text)
    return [*cells, *(extra.get(model, {}).get(name, "") for name in texts)]


def _best(name: str, scores: Mapping[str, Mapping[str, float]]) -> float | None:
    values = [row[name] for row in scores.values() if name in row]
    if not values:
        return None
    return min(values) if lower_is_better(name) else max(values)
