"""The tables of results/*.json, a CPU's, and of results/gpu/*.json.

python studies/inits/table.py      # writes README.md's tables anew
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARKS: Mapping[str, str] = {"": "<!-- table: written by table.py -->", "gpu": "<!-- table of gpu: written by table.py -->"}
"""Folder below results/ to what its tables stand behind in README.md."""
END = "<!-- end -->"
SHOWN = (0, 1, 2, 4, 9, 19, 29, 59)
"""Steps whose training loss is shown, counted from 0: the loss before the step is made."""
PLAIN = "uniform"
Runs = Sequence[Mapping[str, Any]]
"""One a base and seed."""


def read(folder: Path) -> list[dict[str, Any]]:
    """The runs in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(runs: Runs, *, full: bool = True) -> str:
    """Markdown: for each base the best rate of each init and the training losses at each rate beside the plain start's.

    full: with a table a learning rate, of losses step by step.
    """
    parts: list[str] = []
    for storage in dict.fromkeys(run["base"] for run in runs):
        mine = [run for run in runs if run["base"] == storage and run["rates"]]
        if not mine:
            continue
        rates = sorted({rate for run in mine for rate in run["rates"]}, key=float)
        where = ", ".join(dict.fromkeys(run["machine"] for run in mine))
        seeds = f"{len(mine)} seed{'s' if len(mine) > 1 else ''}"
        parts += [f"Base in {storage}, {where}, {seeds}: validation loss by learning rate.", "", *_best(mine, rates), ""]
        parts += [f"Mean of the training losses ÷ that of `{PLAIN}` at the same rate:", "", *_beside(mine, rates), ""]
        for rate in rates if full else ():
            parts += [
                f"Base in {storage}, learning rate {rate}:",
                "",
                *_lines([run for run in mine if rate in run["rates"]], rate),
                "",
            ]
    return "\n".join(parts).rstrip()


def inits(runs: Runs) -> list[str]:
    """All that were trained, in their order."""
    return list(dict.fromkeys(name for run in runs for rate in run["rates"].values() for name in rate["train"]))


def validation(runs: Runs, name: str, rate: str) -> dict[int, float]:
    """By seed, where it was measured and is a number."""
    found = {run["seed"]: run["rates"].get(rate, {}).get("validation", {}).get(name, math.nan) for run in runs}
    return {seed: loss for seed, loss in found.items() if math.isfinite(loss)}


def best_rate(runs: Runs, name: str, rates: Sequence[str]) -> str | None:
    """With the lowest mean over seeds, of those that no seed lacks; None without one."""
    whole = {rate: found for rate in rates if len(found := validation(runs, name, rate)) == len(runs)}
    return min(whole, key=lambda rate: statistics.mean(whole[rate].values()), default=None)


def _best(runs: Runs, rates: Sequence[str]) -> list[str]:
    """A line an init: mean validation loss at each rate, and the best of it beside the best of the plain start, seed by seed."""
    lines = ["| init | " + " | ".join(rates) + f" | best rate | there | ÷ best `{PLAIN}` |", "|---" * (4 + len(rates)) + "|"]
    plain_rate = best_rate(runs, PLAIN, rates)
    plain = {} if plain_rate is None else validation(runs, PLAIN, plain_rate)
    for name in inits(runs):
        best = best_rate(runs, name, rates)
        cells = []
        for rate in rates:
            found = validation(runs, name, rate)
            mean = f"{statistics.mean(found.values()):.4f}" if len(found) == len(runs) else "–"
            cells.append(f"**{mean}**" if rate == best else mean)
        mine = {} if best is None else validation(runs, name, best)
        ratio = spread([mine[seed] / plain[seed] for seed in mine if seed in plain], 3)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {best or '–'} | {spread(list(mine.values()), 4)} | {ratio} |")
    return lines


def _beside(runs: Runs, rates: Sequence[str]) -> list[str]:
    """A line an init: at each rate the ratio of mean training losses, seed by seed."""
    lines = ["| init | " + " | ".join(rates) + " |", "|---" * (1 + len(rates)) + "|"]
    for name in inits(runs):
        cells = [spread(list(ratios.values()), 3) for rate in rates for ratios in [_ratios(runs, name, rate)]]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def _ratios(runs: Runs, name: str, rate: str) -> dict[int, float]:
    """Mean training loss over the plain start's, by seed."""
    curves = {run["seed"]: run["rates"][rate]["train"] for run in runs if rate in run["rates"]}
    both = {seed: train for seed, train in curves.items() if name in train and PLAIN in train}
    return {seed: statistics.mean(train[name]) / statistics.mean(train[PLAIN]) for seed, train in both.items()}


def _lines(runs: Runs, rate: str) -> list[str]:
    """A line an init at one rate, over the seeds."""
    measured = [run["rates"][rate]["train"] for run in runs]
    steps = [step for step in SHOWN if step < min(len(curve) for train in measured for curve in train.values())]
    heads = [f"step {step + 1}" for step in steps]
    lines = [
        "| init | " + " | ".join(heads) + " | mean of all | ÷ uniform | validation | ÷ uniform |",
        "|---" * (5 + len(steps)) + "|",
    ]
    plain = validation(runs, PLAIN, rate)
    for name in inits(runs):
        curves = [train[name] for train in measured if name in train]
        if not curves:
            continue
        shown = " | ".join(f"{statistics.mean(curve[step] for curve in curves):.3f}" for step in steps)
        final = validation(runs, name, rate)
        final_ratio = spread([final[seed] / plain[seed] for seed in final if seed in plain], 3)
        means, ratios = [statistics.mean(curve) for curve in curves], list(_ratios(runs, name, rate).values())
        cells = [f"`{name}`", shown, spread(means, 4), spread(ratios, 3), spread(list(final.values()), 4), final_ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float], digits: int) -> str:
    """Their mean, and the lowest and the highest where they differ."""
    if not values:
        return "–"
    mean, lowest, highest = (f"{found:.{digits}f}" for found in (statistics.mean(values), min(values), max(values)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def with_table(text: str, runs: Runs, name: str = "") -> str:
    """README.md with the tables of `runs` between the marks of results/`name`; a GPU's many rates without their steps."""
    before, mark, rest = text.partition(MARKS[name])
    return f"{before}{mark}\n{table(runs, full=not name)}\n{END}{rest.partition(END)[2]}" if mark else text


def write(folder: Path) -> None:
    """Print the tables of the results in `folder`; write them into README.md where it is the study's own."""
    runs = read(folder)
    print(table(runs))
    readme = HERE / "README.md"
    for name in MARKS:
        if runs and folder.resolve() == HERE / "results" / name and readme.is_file():
            readme.write_text(with_table(readme.read_text(encoding="utf-8"), runs, name), encoding="utf-8")


if __name__ == "__main__":
    for name in MARKS:
        write(HERE / "results" / name)
