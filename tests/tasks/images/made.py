"""Small pictures made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (128, 128, 128)}


def picture(colour: str, number: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A noisy patch of one colour; another for each number."""
    noise = np.random.default_rng(number).integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def folder(where: Path, *, each: int = 6, classes: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    """An image folder, with a folder a class."""
    for place, name in enumerate(classes):
        (where / name).mkdir(parents=True)
        for number in range(each):
            picture(name, 100 * place + number).save(where / name / f"{number}.png")
    return where


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """The picture's file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()
