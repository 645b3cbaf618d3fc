"""Sign digits cut out of their photographs and pasted on grounds drawn by numpy, with COCO files: a data set for detectors.

    python studies/sign_detection/pictures.py sign_digits.zip out/signs

makes `base` (digits 0 to 5), `new` (6 to 9) and their held-out parts, of photographs that no other part has. The same seed gives
the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SIDE = 96
"""Pixels of a picture."""
OLD, NEW = tuple("012345"), tuple("6789")
PARTS = {
    "base/train": (OLD, 700),
    "base/valid": (OLD, 120),
    "new/train": (NEW, 240),
    "new/valid": (NEW, 60),
    "new/test": (NEW, 200),
}
"""Part → its digits and its number of pictures."""
SHARES = {"train": (0.0, 0.6), "valid": (0.6, 0.75), "test": (0.75, 1.0)}
"""Split → which of a digit's photographs it pastes, as shares of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path, help="Sign Language Digits, a folder a digit")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.zip, args.output, args.seed)


def make(archive: Path, output: Path, seed: int = 0) -> None:
    """Write every part."""
    hands = read_hands(archive, seed)
    for number, (part, (digits, count)) in enumerate(PARTS.items()):
        low, high = SHARES[part.rpartition("/")[2]]
        pool = {digit: hands[digit][int(low * len(hands[digit])) : int(high * len(hands[digit]))] for digit in digits}
        write_part(output / part, pool, count, np.random.default_rng([seed, number]))
        print(f"{output / part}: {count} pictures of {', '.join(digits)}", flush=True)


def read_hands(archive: Path, seed: int) -> dict[str, list[Image.Image]]:
    """Digit to its hands, cut out (RGBA), in an order that the seed says."""
    hands: dict[str, list[Image.Image]] = {}
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            digit = Path(name).parent.name
            if name.lower().endswith(".jpg") and digit.isdigit():
                hand = cut_out(Image.open(io.BytesIO(files.read(name))).convert("RGB"))
                hands.setdefault(digit, []).extend([hand] if hand is not None else [])
    for digit, own in hands.items():
        order = np.random.default_rng([seed, int(digit), 99]).permutation(len(own))
        hands[digit] = [own[i] for i in order]
    return hands


def cut_out(photograph: Image.Image) -> Image.Image | None:
    """The hand without its ground, which is grey where skin isn't (Otsu's threshold of red − blue); None where that fails."""
    pixels = np.asarray(photograph, dtype=np.float64)
    warmth = (pixels[..., 0] - pixels[..., 2]) / (pixels.sum(-1) + 30) * 255
    smooth = Image.fromarray(np.clip(warmth, 0, 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(3))
    values = np.asarray(smooth, dtype=np.float64)
    mask = values > _otsu(values)
    if not 0.08 < mask.mean() < 0.55:
        return None
    alpha = Image.fromarray((mask * 255).astype(np.uint8))
    box = alpha.getbbox()
    cut = photograph.copy()
    cut.putalpha(alpha.filter(ImageFilter.GaussianBlur(0.6)))
    return cut.crop(box)


def _otsu(values: np.ndarray) -> float:
    counts, edges = np.histogram(values, 64)
    share = counts / counts.sum()
    below = np.cumsum(share)
    mean = np.cumsum(share * (edges[:-1] + edges[1:]) / 2)
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-9)
    return float(edges[between.argmax() + 1])


def ground(numbers: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: a gradient of two colours, a pattern of waves, noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    first, second, third = numbers.integers(20, 236, (3, 3))
    angle = numbers.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle) + 1.5) / 3
    colour = first + (second - first) * along[..., None]
    waves = np.sin(numbers.uniform(5, 40) * (x + numbers.uniform(-1, 1) * y)) * np.sin(numbers.uniform(5, 40) * y)
    colour = colour + (third - colour) * (numbers.uniform(0, 0.5) * (waves > numbers.uniform(-0.2, 0.6)))[..., None]
    return np.clip(colour + numbers.normal(0, numbers.uniform(2, 14), colour.shape), 0, 255).astype(np.uint8)


def write_part(folder: Path, pool: dict[str, list[Image.Image]], count: int, numbers: np.random.Generator) -> None:
    """Pictures of one to three hands that don't overlap, and a COCO file."""
    folder.mkdir(parents=True)
    digits = sorted(pool)
    images: list[dict[str, object]] = []
    notes: list[dict[str, object]] = []
    for i in range(count):
        picture, taken = Image.fromarray(ground(numbers)), list[tuple[int, int, int, int]]()
        for _ in range(int(numbers.integers(1, 4))):
            digit = str(numbers.choice(digits))
            hand = _varied(pool[digit][int(numbers.integers(len(pool[digit])))], numbers)
            place = _place(hand.size, taken, numbers)
            if place is None:
                continue
            picture.paste(hand, place, hand)
            taken.append((*place, *hand.size))
            notes.append({"id": len(notes) + 1, "image_id": i + 1, "category_id": int(digit) + 1, "bbox": list(taken[-1])})
        picture.save(folder / f"{i:04d}.png")
        images.append({"id": i + 1, "file_name": f"{i:04d}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": int(digit) + 1, "name": f"sign {digit}"} for digit in digits]
    content = {"images": images, "annotations": notes, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content) + "\n")


def _varied(hand: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """Scaled, and lighter or darker."""
    longest = float(numbers.uniform(36, 58))
    factor = longest / max(hand.size)
    scaled = hand.resize((max(8, round(hand.width * factor)), max(8, round(hand.height * factor))), Image.Resampling.BILINEAR)
    light = float(numbers.uniform(0.75, 1.2))
    channels = [channel.point([min(255, round(v * light)) for v in range(256)]) for channel in scaled.split()[:3]]
    return Image.merge("RGBA", (*channels, scaled.split()[3]))


def _place(
    size: tuple[int, int], taken: Sequence[tuple[int, int, int, int]], numbers: np.random.Generator
) -> tuple[int, int] | None:
    """Upper left corner of a place that is free; None where none was found."""
    for _ in range(20):
        x, y = int(numbers.integers(0, SIDE - size[0] + 1)), int(numbers.integers(0, SIDE - size[1] + 1))
        if all(x + size[0] <= a or a + w <= x or y + size[1] <= b or b + h <= y for a, b, w, h in taken):
            return x, y
    return None


if __name__ == "__main__":
    main()
