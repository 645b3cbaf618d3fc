"""The tables of results/result.json.

python studies/inits/table.py      # writes README.md's tables anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK, END = "<!-- table: written by table.py -->", "<!-- end -->"
SHOWN = (0, 1, 2, 4, 9, 19, 29)
"""Steps whose training loss is shown, counted from 0: the loss before the step is made."""


def table(document: Mapping[str, Any]) -> str:
    """Markdown: for each base and learning rate, a line an init and seed."""
    parts: list[str] = []
    for storage, seeds in document["runs"].items():
        for rate in [f"{rate:g}" for rate in document["settings"]["rates"]]:
            measured = {seed: run for seed, run in seeds.items() if rate in run["rates"]}
            if measured:
                parts += [f"Base in {storage}, learning rate {rate}:", "", *_lines(measured, rate), ""]
    return "\n".join(parts).rstrip()


def _lines(seeds: Mapping[str, Any], rate: str) -> list[str]:
    runs = {seed: run["rates"][rate] for seed, run in seeds.items()}
    steps = [step for step in SHOWN if step < min(len(curve) for run in runs.values() for curve in run["train"].values())]
    heads = [f"step {step + 1}" for step in steps]
    lines = [
        "| init | seed | " + " | ".join(heads) + " | mean of all | ÷ uniform | validation | ÷ uniform |",
        "|---" * (6 + len(steps)) + "|",
    ]
    for name in next(iter(runs.values()))["train"]:
        for seed, run in runs.items():
            curve, plain = run["train"][name], run["train"]["uniform"]
            mean, final = sum(curve) / len(curve), run["validation"][name]
            shown = " | ".join(f"{curve[step]:.3f}" for step in steps)
            lines.append(
                f"| `{name}` | {seed} | {shown} | {mean:.4f} | {mean / (sum(plain) / len(plain)):.3f} | {final:.4f} | "
                f"{final / run['validation']['uniform']:.3f} |"
            )
    return lines


def with_table(text: str, document: Mapping[str, Any]) -> str:
    """README.md with the tables of `document` between its marks."""
    before, mark, rest = text.partition(MARK)
    return f"{before}{mark}\n{table(document)}\n{END}{rest.partition(END)[2]}"


def write(folder: Path) -> None:
    """Print the tables of the result in `folder`; write them into README.md where it is the study's own."""
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    print(table(document))
    readme = HERE / "README.md"
    if folder.resolve() == HERE / "results" and readme.is_file():
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    write(HERE / "results")
