"""Two adapters with categories of their own over one small YOLOS, in one pass: coloured squares and circles, no download.

python examples/object_detection.py            # about a minute; out/shapes/samples has pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

import lorabank as lb

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}


def rows(kinds: dict[str, str], count: int, seed: int) -> list[dict[str, Any]]:
    """Pictures of one to three shapes. `kinds`: category → its colour; the shape is a circle where the category says so."""
    numbers = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        picture = Image.fromarray(numbers.integers(190, 255, (64, 64, 3), dtype=np.uint8))
        pen, boxes, names = ImageDraw.Draw(picture), [], []
        for corner in numbers.permutation(4)[: numbers.integers(1, 4)]:
            name = str(numbers.choice(sorted(kinds)))
            side = int(numbers.integers(14, 28))
            x, y = (
                int(32 * (corner % 2) + numbers.integers(0, 33 - side)),
                int(32 * (corner // 2) + numbers.integers(0, 33 - side)),
            )
            draw = pen.ellipse if "circle" in name else pen.rectangle
            draw((x, y, x + side - 1, y + side - 1), fill=COLOURS[kinds[name]])
            boxes.append([x, y, side, side])
            names.append(name)
        made.append({"image": picture, "objects": {"bbox": boxes, "category": names}})
    return made


def main(output: str = "out/shapes", steps: int = 150) -> None:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=[64, 64],
        patch_size=8,
        num_detection_tokens=8,
        initializer_range=0.05,
    )
    result = lb.train(
        model=YolosForObjectDetection(config).eval().requires_grad_(False),  # random: use a pretrained detector for real work
        tokenizer=YolosImageProcessorPil(size={"height": 64, "width": 64}),
        task="object-detection",
        output=output,
        adapters={"colours": {"rank": 16}, "shapes": {"rank": 16}},
        data={
            "colours": rows({"red one": "red", "blue one": "blue"}, 120, seed=1),
            "shapes": rows({"green square": "green", "green circle": "green", "red circle": "red"}, 120, seed=2),
        },
        learning_rate=4e-3,
        batch_size=8,
        max_steps=steps,
        val_split=0.2,
        eval={"every": 50, "metrics": ["loss", "mAP"]},
        listeners=[],
    )
    for name, adapter in result.adapters.items():
        scores = ", ".join(f"{metric} {value:.3f}" for metric, value in adapter.best_metrics.items())
        print(f"{name}: {scores}")
    print(f"pictures: {Path(output) / 'samples'}")


if __name__ == "__main__":
    main()
