"""Three adapters, three sets of labels, one pass: run `python examples/image_classification.py`.

Pictures of shapes are drawn, then named by their shape, by their colour, and by both. Each way of naming is an adapter with a
head of its own over one small network with random weights; `--model` takes a real one (a folder, a hub id, efficientnet-lite0).
Afterwards out/shapes has every adapter, the confusion matrices and the sample pictures.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import ResNetConfig, ResNetForImageClassification

import lorabank as lb
from lorabank.config.images import ImagesConfig
from lorabank.tasks.images.preprocess import plain_processor

COLOURS = {"red": (214, 60, 50), "green": (60, 160, 90), "blue": (50, 90, 200), "yellow": (230, 190, 50)}
SHAPES = ("circle", "square", "triangle")
SIZE = 48


def drawn(shape: str, colour: str, chance: random.Random) -> Image.Image:
    """One shape somewhere on a grey ground."""
    picture = Image.new("RGB", (SIZE, SIZE), (chance.randint(150, 220),) * 3)
    radius = chance.randint(9, 15)
    x, y = (chance.randint(radius + 2, SIZE - radius - 2) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour])
    return picture


def rows(each: int) -> dict[str, list[dict[str, object]]]:
    """Adapter to its rows: the same pictures, named in three ways."""
    chance = random.Random(0)
    named: dict[str, list[dict[str, object]]] = {"shape": [], "colour": [], "both": []}
    for shape in SHAPES:
        for colour in COLOURS:
            for _ in range(each):
                picture = drawn(shape, colour, chance)
                for way, label in (("shape", shape), ("colour", colour), ("both", f"{colour} {shape}")):
                    named[way].append({"image": picture, "label": label})
    return named


def main(output: str = "out/shapes", *, model: str | None = None, each: int = 30, epochs: float = 16) -> lb.RunResult:
    """Train the three adapters jointly; returns their scores."""
    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    base = {"model": model} if model else {
        "model": ResNetForImageClassification(small).eval(),
        "tokenizer": plain_processor(ImagesConfig(image_size=SIZE)),
    }  # fmt: skip
    return lb.train(
        **base,
        task="image-classification",
        data=rows(each),
        adapters={name: {} for name in ("shape", "colour", "both")},
        output=output,
        targets=["all-linear", "all-conv"],
        rank=8,
        learning_rate=3e-3,
        batch_size=16,
        epochs=epochs,
        val_split=0.2,
        eval={"every": 24, "best": "accuracy"},
        images={"augment": ["crop", "flip"], "image_size": SIZE},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of a small network with random weights")
    parser.add_argument("--output", default="out/shapes", help="run folder (default: %(default)s)")
    args = parser.parse_args()
    result = main(args.output, model=args.model)
    for name, adapter in result.adapters.items():
        scores = ", ".join(f"{key} {value:.3f}" for key, value in adapter.best_metrics.items())
        print(f"{name:7s} {scores}")
    print(f"confusion matrices and sample pictures: {Path(result.output) / 'samples.md'}")
