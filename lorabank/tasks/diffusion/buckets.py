"""Aspect-ratio buckets: pictures of like shape are scaled and cropped to one size, so that little of them is cut off."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, order=True)
class Size:
    """Pixels."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of the whole picture."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.width} × {self.height}"


@dataclass(frozen=True)
class Fit:
    """How a picture becomes one of its bucket's size: scaled to cover it, then cropped around its middle."""

    bucket: Size
    scaled: Size
    top: int
    left: int


def buckets_of(resolution: int, *, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes with sides that `step` divides, at most `resolution`² pixels, and no side more than `max_aspect` times the other.

    For each width the greatest height; the square of `resolution` is among them where `step` divides it.
    """
    found: set[Size] = set()
    most = resolution * resolution
    for width in range(step, int(resolution * max_aspect) + 1, step):
        height = min(most // width // step * step, int(resolution * max_aspect) // step * step)
        if height >= step and max(height, width) <= max_aspect * min(height, width):
            found.add(Size(height, width))
    return tuple(sorted(found)) or (Size(step, step),)


def nearest(buckets: tuple[Size, ...], height: int, width: int) -> Size:
    """The bucket whose shape is nearest by ratio; of several, the largest."""
    aspect = width / height

    def distance(size: Size) -> tuple[float, int]:
        own = size.width / size.height
        return max(own / aspect, aspect / own), -size.pixels

    return min(buckets, key=distance)


def fit(bucket: Size, height: int, width: int) -> Fit:
    """Cover the bucket, and keep the middle."""
    scale = max(bucket.height / height, bucket.width / width)
    scaled = Size(max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale)))
    return Fit(bucket, scaled, (scaled.height - bucket.height) // 2, (scaled.width - bucket.width) // 2)


def fitted(picture: Image.Image, how: Fit) -> Image.Image:
    """The picture at its bucket's size."""
    if picture.size != (how.scaled.width, how.scaled.height):
        picture = picture.resize((how.scaled.width, how.scaled.height), Image.Resampling.LANCZOS)
    box = (how.left, how.top, how.left + how.bucket.width, how.top + how.bucket.height)
    return picture if picture.size == (how.bucket.width, how.bucket.height) else picture.crop(box)
