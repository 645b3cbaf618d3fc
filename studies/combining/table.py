"""The table of results/result.json.

python studies/combining/table.py      # writes README.md's table anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK, END = "<!-- table: written by table.py -->", "<!-- end -->"


def table(document: Mapping[str, Any]) -> str:
    """Markdown: a line each for the base, the adapters and the combinations; their mean loss against that of `exact`."""
    slices = list(document["rows"])
    reference = next(_mean(case["losses"], slices) for case in document["cases"] if case["method"] == "exact")
    lines = [
        "| method | weights | rank | ‖ΔW − result‖/‖ΔW‖ | " + " | ".join(f"loss on {s}" for s in slices) + " | mean ÷ exact's |",
        "|---" * (5 + len(slices)) + "|",
    ]
    for name, losses in document["alone"].items():
        label = "base alone" if name == "base" else f"`{name}` alone"
        rank = "–" if name == "base" else str(document["settings"]["rank"])
        lines.append(f"| {label} | – | {rank} | – | {_losses(losses, slices)} | {_mean(losses, slices) / reference:.3f} |")
    for case in document["cases"]:
        said = [f"{key} {value:g}" for key, value in case["options"].items() if key != "rank"]
        label = ", ".join([f"`{case['method']}`", *said])
        low, high = case["ranks"]
        rank = str(low) if low == high else f"{low} to {high}"
        error = "0" if case["error"] < 1e-5 else f"{case['error']:.3f}"
        weights = ", ".join(f"{weight:g}" for weight in case["weights"])
        mean = f"{_mean(case['losses'], slices) / reference:.3f}"
        lines.append(f"| {label} | {weights} | {rank} | {error} | {_losses(case['losses'], slices)} | {mean} |")
    return "\n".join(lines)


def _losses(losses: Mapping[str, float], slices: list[str]) -> str:
    return " | ".join(f"{losses[name]:.4f}" for name in slices)


def _mean(losses: Mapping[str, float], slices: list[str]) -> float:
    return sum(losses[name] for name in slices) / len(slices)


def with_table(text: str, document: Mapping[str, Any]) -> str:
    """README.md with the table of `document` between its marks."""
    before, mark, rest = text.partition(MARK)
    return f"{before}{mark}\n{table(document)}\n{END}{rest.partition(END)[2]}"


def write(folder: Path) -> None:
    """Print the table of the result in `folder`; write it into README.md where it is the study's own."""
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    print(table(document))
    readme = HERE / "README.md"
    if folder.resolve() == HERE / "results" and readme.is_file():
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    write(HERE / "results")
