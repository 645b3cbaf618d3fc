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
START, END = "<!-- table: written by label_tables.py -->", "<!-- table: end -->"


def best(document: Mapping[str, Any], method: str, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """(rate, run) of the lower validation loss; None where there was no run."""
    found = {key.split("/")[2]: run for key, run in document["runs"].items() if key.startswith(f"{method}/{name}/")}
    return min(found.items(), key=lambda item: item[1]["val"]["loss"]) if found else None


def table(document: Mapping[str, Any]) -> str:
    """A row a method, test scores a label set."""
    names = list(dict.fromkeys(key.split("/")[1] for key in document["runs"]))
    lines = [
        f"| | trained | {' | '.join(f'{name}: accuracy, F1, Matthews' for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    rates: dict[str, str] = {}
    for method, called in METHODS.items():
        chosen = {name: best(document, method, name) for name in names}
        if not any(chosen.values()):
            continue
        share = max(found[1]["parameters"] for found in chosen.values() if found) / BASE_PARAMETERS
        lines.append(f"| {called} | {100 * share:.3g} % | {' | '.join(map(_cell, chosen.values()))} |")
        rates[called] = ", ".join(f"{name} {found[0]}" for name, found in chosen.items() if found)
    lines += ["", "Learning rates: " + "; ".join(f"{called}: {text}" for called, text in rates.items()) + "."]
    return "\n".join(lines)


def _cell(found: tuple[str, Mapping[str, Any]] | None) -> str:
    if found is None:
        return "not run"
    test = found[1]["test"]
    return f"{100 * test['accuracy']:.1f} %, {test['f1']:.3f}, {test['matthews']:.3f}"


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
