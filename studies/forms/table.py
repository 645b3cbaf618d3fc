"""Tables, samples and picture, of results/: `python studies/forms/table.py` writes README.md, samples.md and slots.png."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- {}: written by table.py -->", "<!-- {}: end -->"
TITLES = {
    "base": "the base as it is",
    "lora": "LoRA, both tasks in one pass",
    "alone": "LoRA, each task alone",
    "full": "full fine-tuning",
    "references": "people's own texts",
}
FIGURES = {
    "parameters": "parameters",
    "rate": "rate",
    "loss": "validation loss",
    "figures": "figures said",
    "wrong figure": "wrong figures",
    "names": "names said",
    "kind and food": "kind and food said",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rougeL": "ROUGE-L",
    "dev figures": "figures said, dev",
    "dev kind and food": "kind and food said, dev",
}
FORM = {
    "parameters": "parameters",
    "rate": "rate",
    "loss": "validation loss",
    "f1": "slots, F1",
    "exact": "whole form right",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rougeL": "ROUGE-L",
    "dev f1": "slots, F1, dev",
    "dev exact": "whole form right, dev",
}
"""`dev`: validation rows."""
WORDS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rougeL": "ROUGE-L",
    "names": "names said",
    "kind and food": "kind and food said",
    "wrong figure": "wrong figures",
}
SHARES = ("figures", "wrong figure", "names", "kind and food", "area", "f1", "exact")
Runs = Mapping[str, Mapping[str, Any]]


def best(runs: Runs, start: str) -> str | None:
    """Key of the lowest validation loss among those that start so and were tested."""
    found = [key for key in runs if key.startswith(start) and runs[key].get("test")]
    return min(found, key=lambda key: runs[key]["val"]) if found else None


def shown(runs: Runs, task: str) -> list[tuple[str, str]]:
    """(title, key) of the rows of a task's table."""
    rows = [(TITLES["base"], "base")]
    rank = {method: best(runs, f"{method}/{task}/r16/") for method in ("lora", "alone")} | {"full": best(runs, f"full/{task}/")}
    rows += [(TITLES[method], key) for method, key in rank.items() if key]
    others = [key for key in runs if key.startswith(f"lora/{task}/") and "/r16/" not in key and runs[key].get("test")]
    rows += [(f"LoRA, rank {key.split('/')[2][1:]}", key) for key in sorted(others, key=lambda key: int(key.split("/")[2][1:]))]
    return rows + ([(TITLES["references"], "references")] if task in runs.get("references", {}).get("test", {}) else [])


def table(runs: Runs, task: str) -> str:
    """Markdown: a method a row."""
    columns = FIGURES if task == "figures" else FORM
    lines = [f"| | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    whole = next((run["parameters"] for key, run in runs.items() if key.startswith("full/")), 0)
    for title, key in shown(runs, task):
        run, scores = runs[key], dict(runs[key]["test"][task])
        scores |= {f"dev {name}": value for name, value in runs[key]["test"].get(f"{task}-dev", {}).items()}
        cells = []
        for column in columns:
            if column == "parameters":
                cells.append(f"{run['parameters']:,} ({100 * run['parameters'] / whole:.1f} %)" if "parameters" in run else "–")
            elif column == "rate":
                cells.append(key.split("/")[3] if "/" in key else "–")
            elif column == "loss":
                cells.append(f"{run['val']:.4f}" if "val" in run else "–")
            else:
                cells.append(_shown(column, scores[column]) if column in scores else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    searched = []
    for method in ("lora", "full"):
        own = [key for key in runs if key.startswith(f"{method}/{task}/") and (method == "full" or "/r16/" in key)]
        own.sort(key=lambda key: float(key.split("/")[3]))
        searched.append(f"{TITLES[method]}: " + ", ".join(f"{key.split('/')[3]}: {runs[key]['val']:.4f}" for key in own))
    return "\n".join([*lines, "", f"Validation loss by rate: {'; '.join(searched)}."])


def words(runs: Runs) -> str:
    """What is left of what the base could do."""
    lines = [f"| | {' | '.join(WORDS.values())} |", "|---|" + "---|" * len(WORDS)]
    rows = [("the base, and every row that is routed to it", "base")]
    rows += [
        (f"with {name}", best(runs, start))
        for name, start in (("the adapter `figures`", "lora/figures/r16"), ("all weights tuned to figures", "full/figures/"))
    ]
    for title, key in [*rows, (TITLES["references"], "references")]:
        scores = runs.get(key or "", {}).get("test", {}).get("words")
        if scores:
            lines.append(f"| {title} | {' | '.join(_shown(c, scores[c]) if c in scores else '–' for c in WORDS)} |")
    return "\n".join(lines)


def slots_table(runs: Runs) -> str:
    """Recall of each slot of the form."""
    rows = [(title, runs[key]["test"]["form"]) for title, key in shown(runs, "form")]
    names = [name for name in rows[0][1] if name.startswith("recall of ")]
    lines = ["| " + " | ".join(["", *(name.removeprefix("recall of ") for name in names)]) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {title} | {' | '.join(f'{100 * scores[name]:.0f} %' for name in names)} |" for title, scores in rows]
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if name.removeprefix("dev ") in SHARES:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f}" if name.startswith("rouge") else f"{value:.1f}"


def with_tables(text: str, runs: Runs) -> str:
    """The page with its tables anew."""
    made = {"figures": table(runs, "figures"), "form": table(runs, "form"), "slots": slots_table(runs), "words": words(runs)}
    for name, lines in made.items():
        start, end = START.format(name), END.format(name)
        text = re.sub(
            f"{re.escape(start)}.*?{re.escape(end)}", f"{start}\n{lines}\n{end}".replace("\\", "\\\\"), text, flags=re.DOTALL
        )
    return text


def samples(document: Mapping[str, Any]) -> str:
    """What was written for a few test rows."""
    runs, parts = document["runs"], ["# What was written", "", "Six rows of each test set, spread evenly; none was picked."]
    for task, own in document["samples"].items():
        others = [
            (TITLES[key.split("/")[0]], key) for key in own if key != "rows"
        ]  # of forms that the adapters weren't trained for
        keys = [(title, key) for title, key in (others if task == "words" else shown(runs, task)) if key in own]
        parts += ["", f"## {task}"]
        for i, (source, reference) in enumerate(own["rows"]):
            parts += ["", f"**{source}**", "", f"- one of the references: {reference}"]
            parts += [f"- {title}: {own[key][i] or '(nothing)'}" for title, key in keys]
    return "\n".join(parts) + "\n"


def picture(runs: Runs, out_png: Path) -> None:
    """Recall of each slot of the form, a bar a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lorabank.training.plots import COLOURS

    rows: Sequence[tuple[str, str]] = [row for row in shown(runs, "form") if not row[1].startswith(("alone/", "base"))]
    names = [name for name in runs["base"]["test"]["form"] if name.startswith("recall of ")]
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, (title, key) in enumerate(rows):
        heights = [100 * runs[key]["test"]["form"][name] for name in names]
        axes.bar([x + i * width for x in range(len(names))], heights, width, color=COLOURS[i % len(COLOURS)], label=title)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], [name.removeprefix("recall of ") for name in names])
    axes.set_ylabel("test forms with the slot right, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8.5, ncols=len(rows), loc="outside upper center")
    figure.savefig(out_png)


def main() -> None:
    """Write all of them."""
    document = json.loads((HERE / "results" / "result.json").read_text(encoding="utf-8"))
    page = HERE / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), document["runs"]), encoding="utf-8")
    (HERE / "samples.md").write_text(samples(document), encoding="utf-8")
    picture(document["runs"], HERE / "slots.png")


if __name__ == "__main__":
    main()
