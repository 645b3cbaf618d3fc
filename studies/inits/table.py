"""The tables of results/*.json.

python studies/inits/table.py      # writes README.md's tables anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK, END = "<!-- table: written by table.py -->", "<!-- end -->"
SHOWN = (0, 1, 2, 4, 9, 19, 29)
"""Steps whose training loss is shown, counted from 0: the loss before the step is made."""


def read(folder: Path) -> list[dict[str, Any]]:
    """The runs in a folder, one a base and seed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: for each base and learning rate, a line an init and seed."""
    parts: list[str] = []
    for storage in dict.fromkeys(run["base"] for run in runs):
        mine = [run for run in runs if run["base"] == storage]
        for rate in sorted({rate for run in mine for rate in run["rates"]}, key=float):
            measured = {str(run["seed"]): run for run in mine if rate in run["rates"]}
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


def with_table(text: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """README.md with the tables of `runs` between its marks."""
    before, mark, rest = text.partition(MARK)
    return f"{before}{mark}\n{table(runs)}\n{END}{rest.partition(END)[2]}"


def write(folder: Path) -> None:
    """Print the tables of the results in `folder`; write them into README.md where it is the study's own."""
    runs = read(folder)
    print(table(runs))
    readme = HERE / "README.md"
    if folder.resolve() == HERE / "results" and readme.is_file():
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), runs), encoding="utf-8")


if __name__ == "__main__":
    write(HERE / "results")
