"""The tables of README.md, from results/: each method at its rate of lower validation loss."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = {"head": "head alone", "lora": "LoRA, three adapters jointly", "full": "full fine-tuning, three runs"}
ONE = {"head": "head alone", "lora": "LoRA", "full": "full fine-tuning"}
"""The same where there is one label set."""
BASE_PARAMETERS = 22_713_216
"""Of all-MiniLM-L6-v2 with its pooler, heads aside."""
START, END = "<!-- {}: written by label_tables.py -->", "<!-- {}: end -->"
SCORES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews"}
"""Of labels, and their names."""
NUMBERS = {"pearson": "Pearson", "spearman": "Spearman", "loss": "mean squared error"}
"""Of numbers."""
BY_SEED = ("accuracy", "loss")
"""Scores of which each seed's is shown, and not the mean alone."""
Document = Mapping[str, Any]
Documents = Mapping[str, Sequence[Document]]


def best(document: Document, method: str, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """(rate, run) of the lower validation loss; None where there was no run."""
    found = {key.split("/")[2]: run for key, run in document["runs"].items() if key.startswith(f"{method}/{name}/")}
    return min(found.items(), key=lambda item: item[1]["val"]["loss"]) if found else None


def table(documents: Sequence[Document]) -> str:
    """A row a method, test scores a label set. Rates are those of the first document; others are other seeds at these rates."""
    document = documents[0]
    names = list(dict.fromkeys(key.split("/")[1] for key in document["runs"]))
    scores = NUMBERS if "pearson" in next(iter(document["runs"].values()))["test"] else SCORES
    heads = [f"{name}: {', '.join(scores.values())}" for name in names]
    lines = [f"| | trained | {' | '.join(heads)} |", f"|---|---|{'---|' * len(names)}"]
    rates: dict[str, str] = {}
    for method, called in (METHODS if len(names) > 1 else ONE).items():
        chosen = {name: best(document, method, name) for name in names}
        if not any(chosen.values()):
            continue
        share = max(found[1]["parameters"] for found in chosen.values() if found) / BASE_PARAMETERS
        cells = [_cell(documents, f"{method}/{name}/{found[0]}" if found else "", scores) for name, found in chosen.items()]
        lines.append(f"| {called} | {100 * share:.3g} % | {' | '.join(cells)} |")
        rates[called] = ", ".join(
            f"{name} {found[0]}{_others(document, method, name)}" for name, found in chosen.items() if found
        )
    lines += ["", "Learning rates: " + "; ".join(f"{called}: {text}" for called, text in rates.items()) + "."]
    return "\n".join(lines)


def _others(document: Document, method: str, name: str) -> str:
    """Validation losses of the rates that were searched."""
    losses = {
        key.split("/")[2]: run["val"]["loss"] for key, run in document["runs"].items() if key.startswith(f"{method}/{name}/")
    }
    return "" if len(losses) < 2 else f" ({', '.join(f'{rate}: {loss:.3f}' for rate, loss in losses.items())})"


def _cell(documents: Sequence[Document], key: str, scores: Mapping[str, str]) -> str:
    runs = [document["runs"][key]["test"] for document in documents if key in document["runs"]]
    if not runs:
        return "not run"
    return ", ".join(_each([run[score] for run in runs], score == "accuracy", score in BY_SEED) for score in scores)


def _each(values: Sequence[float], share: bool, each: bool) -> str:
    """The mean; with `each` the values too, where there are several."""
    text = [f"{100 * value:.1f}" if share else f"{value:.3f}" for value in [sum(values) / len(values), *values]]
    unit = " %" if share else ""
    return text[0] + unit + (f" ({', '.join(text[1:])})" if each and len(values) > 1 else "")


def load(folder: Path = HERE / "results") -> Documents:
    """Name of a table to its documents: `NAME.json`, then `NAME-seedN.json`."""
    names = sorted({re.sub(r"-seed\d+$", "", file.stem) for file in folder.glob("*.json")})
    files = {name: [folder / f"{name}.json", *sorted(folder.glob(f"{name}-seed*.json"))] for name in names}
    return {name: [json.loads(file.read_text(encoding="utf-8")) for file in own] for name, own in files.items()}


def with_tables(text: str, documents: Documents) -> str:
    """The page with its tables anew."""
    for name, own in documents.items():
        start, end, made = START.format(name), END.format(name), table(own)
        text = re.sub(
            rf"{re.escape(start)}.*?{re.escape(end)}", lambda _, s=start, m=made, e=end: f"{s}\n{m}\n{e}", text, flags=re.DOTALL
        )
    return text


def write() -> None:
    """Put the tables into README.md."""
    page = HERE / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), load()), encoding="utf-8")


if __name__ == "__main__":
    write()
