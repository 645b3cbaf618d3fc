"""Makes the tables of README.md from results/*.json and results/second/*.json: python studies/sign_detection/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STARTS = {"<!-- table: written by table.py -->\n": "results", "<!-- second table: written by table.py -->\n": "results/second"}
"""Line above a table to the folder of its figures."""
END = "<!-- end -->"
ARMS = {
    "lora": "LoRA (rank 8 on linear layers and convolutions, α {alpha}, B's rate × {b:g}), a new head begun as {start}",
    "head": "a new head alone",
    "full": "full training from the base, with a new head",
}


def order(told: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of an arm: by how the head begins, rate and seed."""
    return told.get("start", ""), -told.get("alpha", 0), told["rate"], told.get("seed", 1)


def table(folder: Path) -> str:
    """The rows, a run each."""
    lines = [
        "| arm | trained | learning rate | seed | validation mAP | loss | mAP | mAP50 | mAP75 | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, what in ARMS.items():
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{arm}-*.json"))]
        for told in sorted(found, key=order):
            scores, val, seed = told["test"], told["valid"]["mAP"], told.get("seed", 1)
            lines.append(
                f"| {what.format(**told)} | {told['trained']:,} | {told['rate']:g} | {seed} | {val:.3f} | {scores['loss']:.2f} | "
                f"{scores['mAP']:.3f} | {scores['mAP50']:.3f} | {scores['mAP75']:.3f} | {told['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for start, folder in STARTS.items():
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table(HERE / folder)}{END}{rest.partition(END)[2]}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
