"""What does LoRA learn of new categories, beside a new head alone and full training? Three arms from one base model.

    python studies/sign_detection/pictures.py sign_digits.zip out/signs
    python studies/sign_detection/base.py out/signs/base out/signs_base
    python studies/sign_detection/run.py out/signs out/signs_base out/signs_runs

Every arm is given the same number of pictures, varied in the same ways. `results/*.json` are the figures, `results/*.png` what
was found in the first test pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from base import AUGMENT, task_of
from transformers import AutoModelForObjectDetection, RTDetrImageProcessorPil

import lorabank as lb
from lorabank.bank.in_full.heads import detector_heads
from lorabank.tasks.detection.draw import drawn, sheet
from lorabank.tasks.detection.loss import detection_loss
from lorabank.tasks.detection.metrics import coco_scores
from lorabank.tasks.detection.rows import DetectionRow

HERE = Path(__file__).parent
BATCH, EPOCHS = 8, 7
RATES = {"lora": (1e-3, 3e-3, 1e-2), "head": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}
"""Arm → learning rates that are tried, each for the whole run; the best on the validation pictures is drawn."""
RANK, ALPHA, SLOWER, SHOWN = 8, 8, 1.0, 0.3


def plain(arm: str, base: Path, labels: list[str], rate: float, data: Path, seed: int) -> tuple[dict[str, Any], Any, Any]:
    """Head alone or full training, in a plain loop over the task's batches and loss."""
    torch.manual_seed(seed)
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = AutoModelForObjectDetection.from_pretrained(base, ignore_mismatched_sizes=True, **names)
    task, rows = task_of(model, RTDetrImageProcessorPil.from_pretrained(base), data)
    heads = tuple(f"{path}." for path in detector_heads(model))
    mine = [p for name, p in model.named_parameters() if arm != "head" or name.startswith(heads)]
    optimizer = torch.optim.AdamW(mine, lr=rate, weight_decay=0.0)
    steps = EPOCHS * (len(rows["train"]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.05, anneal_strategy="linear"
    )
    began = time.process_time()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(1000 * (seed - 1) + epoch)).tolist()
        model.train(arm != "head")
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            draws = [seed + epoch * 1_000_003 + i for i in chosen]
            made = task.batch([[rows["train"][i]] for i in chosen], [lb.BASE] * BATCH, examples=chosen, draws=draws)
            detection_loss(model, made.inputs, made.targets).mean().backward()
            torch.nn.utils.clip_grad_norm_(mine, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    told = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "trained": sum(p.numel() for p in mine),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return told, (task, lb.attach(model.eval().requires_grad_(False))), rows


def lora(base: Path, labels: list[str], rate: float, data: Path, seed: int, output: Path) -> tuple[dict[str, Any], Any, Any]:
    """What `lorabank train` does, from Python."""
    shutil.rmtree(output, ignore_errors=True)
    began = time.process_time()
    done = lb.train(
        model=str(base),
        task="object-detection",
        output=str(output),
        data={"train": str(data)},
        rank=RANK,
        alpha=ALPHA,
        targets=["all-linear", "all-conv"],
        learning_rate=rate,
        loraplus_ratio=SLOWER,  # B learns more slowly than the head, which begins as nothing
        warmup_ratio=0.05,
        batch_size=BATCH,
        max_steps=EPOCHS * (240 // BATCH),
        detection={"augment": list(AUGMENT)},
        eval={"every": 0, "metrics": ["loss", "mAP"], "best": "mAP", "samples": 4},
        save={"every": 0},
        seed=seed,
    )
    seconds, adapter = round(time.process_time() - began, 1), done.trained["default"]
    model = AutoModelForObjectDetection.from_pretrained(base).requires_grad_(False)
    task, rows = task_of(model, RTDetrImageProcessorPil.from_pretrained(base), data, {"default": adapter})
    bank = lb.attach(model)
    bank.load("default", adapter)
    trained = sum(p.numel() for p in bank.parameters("default"))
    told = {"arm": "lora", "rate": rate, "seed": seed, "alpha": ALPHA, "b": SLOWER, "start": "mean"}
    return told | {"trained": trained, "cpu_seconds": seconds}, (task, bank), rows


def answers(task: Any, bank: Any, name: str, rows: Sequence[Any]) -> tuple[float, Any]:
    """Mean loss, and the boxes that are found in each picture."""
    losses, found = task.find(task.engine(bank), {name: rows}, batch_size=32, busy=lambda *_: None)
    return sum(losses[name]) / len(rows), found[name]


def figures(parts: dict[str, Any], task: Any, name: str, rows: dict[str, Any]) -> dict[str, Any]:
    """Scores of what was found in each part."""
    labels = task.labels_of(name)
    return {part: {"loss": loss, **coco_scores(rows[part], found, labels)} for part, (loss, found) in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of those of RATES")
    parser.add_argument("--seed", type=int, default=1, help="of adapter and head, the pictures' order and how they are varied")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the figures and pictures")
    args = parser.parse_args()
    data, results = args.data / "new", args.results
    results.mkdir(exist_ok=True, parents=True)
    labels = [each["name"] for each in json.loads((data / "train/_annotations.coco.json").read_text())["categories"]]
    for arm in args.arms:
        best: tuple[float, Any, Any, Any] | None = None
        for rate in args.rates or RATES[arm]:
            output = args.output / f"lora-{rate:g}-{args.seed}"
            if arm == "lora":
                told, (task, bank), rows = lora(args.base, labels, rate, data, args.seed, output)
                name = "default"
            else:
                told, (task, bank), rows = plain(arm, args.base, labels, rate, data, args.seed)
                name = "base"
            parts = {part: answers(task, bank, name, rows[part]) for part in ("valid", "test")}
            told |= figures(parts, task, name, rows)
            print(json.dumps(told), flush=True)
            kind = f"-mean-alpha{ALPHA}-b{SLOWER:g}" if arm == "lora" else ""
            seed = f"-seed{args.seed}" if args.seed != 1 else ""
            (results / f"{arm}-{rate:g}{kind}{seed}.json").write_text(json.dumps(told, indent=1) + "\n")
            if best is None or told["valid"]["mAP"] > best[0]:
                best = told["valid"]["mAP"], parts["test"][1], task, rows["test"]
        if best is not None and args.seed == 1 and args.rates is None:
            draw(results / f"{arm}.png", best[2], best[3], best[1])


def draw(path: Path, task: Any, rows: Sequence[DetectionRow], found: Sequence[Any]) -> None:
    """The first eight test pictures, what is there beside what was found."""
    columns = []
    for start in (0, 4):
        pictures = [task.store.picture(row) for row in rows[start : start + 4]]
        truth = [drawn(p, [(None, box) for box in row.boxes]) for p, row in zip(pictures, rows[start:], strict=False)]
        seen = [drawn(p, [e for e in boxes if e[0] >= SHOWN]) for p, boxes in zip(pictures, found[start:], strict=False)]
        columns += [("what is there", truth), (f"{path.stem}, score from {SHOWN:g}", seen)]
    sheet(columns, side=240).save(path)


if __name__ == "__main__":
    main()
