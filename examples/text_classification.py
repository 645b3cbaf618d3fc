"""Three label sets on one encoder, trained in one pass a step: what a description of a restaurant says of it.

    python examples/text_classification.py                            # all-MiniLM-L6-v2 from the hub
    python examples/text_classification.py --model FOLDER --steps 60  # any encoder or decoder of transformers

The rows are those of `examples/data`: a label is an attribute that the description was written from. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import lorabank as lb
from lorabank import api

DATA = Path(__file__).parent / "data"
LABELS = {"family": "familyFriendly", "price": "priceRange", "rating": "customer rating"}
ASKED = [
    "The Wrestlers is a cheap pub by the river where children are welcome.",
    "Rated five out of five, the Golden Palace asks high prices and is for adults only.",
]


def rows(part: str, attribute: str) -> list[dict[str, str]]:
    """Descriptions and what they say of one attribute."""
    found = []
    for line in (DATA / f"e2e_{part}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        match = re.search(re.escape(attribute) + r"\[(.*?)\]", row["mr"])
        found.append({"text": row["ref"], "label": match.group(1) if match else "not said"})
    return found


def main() -> None:
    """Train, score, label two sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, default=Path("out/restaurants"))
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    folder = args.output.with_name(args.output.name + "_rows")
    folder.mkdir(parents=True, exist_ok=True)
    for name, attribute in LABELS.items():
        for part in ("train", "val"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(part, attribute)]
            (folder / f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    adapters = {
        name: lb.AdapterRun(
            data=str(folder / f"{name}-train.jsonl"),
            val_data=str(folder / f"{name}-val.jsonl"),
            rank=8,
            batch_size=16,
            learning_rate=1e-3,
            max_steps=args.steps,
        )
        for name in LABELS
    }
    result = lb.train(
        lb.TrainConfig(
            task="text-classification",
            model=args.model,
            output=str(args.output),
            adapters=adapters,
            eval=lb.EvalConfig(every=40, best="accuracy"),
        )
    )
    for name, adapter in result.adapters.items():
        print(name, {metric: round(value, 3) for metric, value in adapter.final_metrics.items()})
    (folder / "asked.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ASKED), encoding="utf-8")
    answers = folder / "answers.jsonl"
    answers.unlink(missing_ok=True)
    print(api.predict(args.output, folder / "asked.jsonl", answers))
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        print(answer["text"], {name: answer[name]["label"] for name in LABELS})


if __name__ == "__main__":
    main()
