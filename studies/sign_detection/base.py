"""A small RT-DETR trained from scratch on the digits 0 to 5, since no pretrained detector is at hand: the study's base model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil, RTDetrResNetConfig

import lorabank as lb
from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig, EvalConfig, TrainConfig
from lorabank.tasks.detection.metrics import coco_scores
from lorabank.tasks.detection.rows import DetectionRow
from lorabank.tasks.detection.task import ObjectDetection

SIDE = 96
AUGMENT = ("crop", "colour")


def small(labels: list[str]) -> RTDetrForObjectDetection:
    """A ResNet of four basic blocks, one encoder and two decoder layers of width 64, 24 queries."""
    widths: dict[str, Any] = {
        "embedding_size": 16,
        "hidden_sizes": [16, 48, 96, 128],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    }
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**widths),
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=64,
        encoder_in_channels=[48, 96, 128],
        encoder_layers=1,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=64,
        num_queries=24,
        decoder_in_channels=[64, 64, 64],
        decoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=24,
        **names,
    )
    return RTDetrForObjectDetection(config)


def task_of(
    model: Any, processor: Any, data: Path, adapters: Mapping[str, lb.Adapter] | None = None
) -> tuple[ObjectDetection, dict[str, list[DetectionRow]]]:
    """lorabank's task over a plain model, for its reading, batches and scores; and the rows by split."""
    config = TrainConfig(
        task="object-detection",
        data=DataConfig(train=str(data), test=str(data / "test") if (data / "test").is_dir() else None),
        detection=DetectionConfig(augment=AUGMENT),
    )
    task = ObjectDetection(config, model, processor, adapters or {})
    (sets,) = task.read(config).by_adapter.values()
    print("\n".join(sets.report.lines()), flush=True)
    return task, {"train": list(sets.train), "valid": list(sets.val), "test": list(sets.test)}


def score(task: ObjectDetection, model: Any, rows: list[DetectionRow], labels: list[str]) -> dict[str, float]:
    """Loss and average precision of the plain model."""
    bank = lb.attach(model.requires_grad_(False))
    try:
        losses, found = task.find(task.engine(bank), {"base": rows}, batch_size=EvalConfig().batch_size * 4, busy=lambda *_: None)
    finally:
        bank.detach()
        model.requires_grad_(True)
    return {"loss": sum(losses["base"]) / len(rows), **coco_scores(rows, found["base"], labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder `base` of pictures.py")
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    labels = [each["name"] for each in json.loads((args.data / "train/_annotations.coco.json").read_text())["categories"]]
    model, processor = small(labels), RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE})
    task, rows = task_of(model, processor, args.data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=1e-4)
    found: dict[str, float] = {}
    steps, began, step = args.epochs * (len(rows["train"]) // args.batch), time.monotonic(), 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.rate, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        order = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(epoch)).tolist()
        model.train()
        total = 0.0
        for start in range(0, len(order) - args.batch + 1, args.batch):
            chosen = order[start : start + args.batch]
            made = task.batch(
                [[rows["train"][i]] for i in chosen],
                [lb.BASE] * len(chosen),
                examples=chosen,
                draws=[1 + epoch * 1_000_003 + i for i in chosen],
            )
            wanted = [
                {"class_labels": numbers[numbers >= 0], "boxes": boxes[numbers >= 0]}
                for numbers, boxes in zip(made.targets["labels"], made.targets["boxes"], strict=True)
            ]
            loss = model(**made.inputs, labels=wanted).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total, step = total + float(loss), step + 1
        if epoch % 4 == 3 or epoch + 1 == args.epochs:
            model.eval()
            found = score(task, model, rows["valid"], labels)
            print(
                f"{time.monotonic() - began:6.0f} s  epoch {epoch + 1}  loss {total * args.batch / len(order):.3f}  {found}",
                flush=True,
            )
    model.eval().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    result = {"seconds": round(time.monotonic() - began), "steps": step, "pictures": len(rows["train"]), **found}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results" / "base.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
