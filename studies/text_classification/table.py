"""The table of README.md, from results/result.json: each method at its rate of lower validation loss."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = {"head": "head alone", "lora": "LoRA, three adapters jointly", "full": "full fine-tuning, three runs"}
BASE_PARAMETERS = 22_713_216
"""Of all-MiniLM-L6-v2 with its pooler, heads aside."""
START, END = "<!-- table: written by table.py -->", "<!-- table: end -->"


def best(document: Mapping[str, Any], method: str, name: str) -> tuple[str, Mapping[str, Any]]:
    """(rate, run) of the lower validation loss."""
    found = {key.split("/")[2]: run for key, run in document["runs"].items() if key.startswith(f"{method}/{name}/")}
    return min(found.items(), key=lambda item: item[1]["val"]["loss"])


def table(document: Mapping[str, Any]) -> str:
    """A row a method, test scores a label set."""
    names = list(dict.fromkeys(key.split("/")[1] for key in document["runs"]))
    lines = [
        f"| | trained | {' | '.join(f'{name}: accuracy, F1, Matthews' for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for method, called in METHODS.items():
        chosen = {name: best(document, method, name) for name in names}
        cells = [
            f"{100 * run['test']['accuracy']:.1f} %, {run['test']['f1']:.3f}, {run['test']['matthews']:.3f}"
            for _, run in chosen.values()
        ]
        share = max(run["parameters"] for _, run in chosen.values()) / BASE_PARAMETERS
        lines.append(f"| {called} | {100 * share:.3g} % | {' | '.join(cells)} |")
    rates = {m: ", ".join(f"{name} {best(document, m, name)[0]}" for name in names) for m in METHODS}
    lines += ["", "Learning rates: " + "; ".join(f"{METHODS[m]}: {text}" for m, text in rates.items()) + "."]
    lora, full = (_seconds(document, m, names) for m in ("lora", "full"))
    lines += [
        "",
        f"Seconds of training: the three adapters {lora:.0f}, scoring of held-out rows included; full fine-tuning {full:.0f}.",
    ]
    return "\n".join(lines)


def _seconds(document: Mapping[str, Any], method: str, names: list[str]) -> float:
    runs = [best(document, method, name)[1] for name in names]
    return runs[0]["seconds_of_all"] if method == "lora" else sum(run["seconds"] for run in runs)


def with_table(text: str, document: Mapping[str, Any]) -> str:
    """The page with its table anew."""
    return re.sub(
        rf"{re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n{table(document)}\n{END}", text, flags=re.DOTALL
    )


def write(document: Mapping[str, Any]) -> None:
    """Print the table, and put it into README.md."""
    print(table(document))
    page = HERE / "README.md"
    if page.exists():
        page.write_text(with_table(page.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    write(json.loads((HERE / "results" / "result.json").read_text(encoding="utf-8")))
