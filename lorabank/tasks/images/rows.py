"""`ImageRow`: one picture that can be used, with its label's name; `PixelStore`: its pixels, kept or read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lorabank.data.row import RowError
from lorabank.errors import DataError
from lorabank.tasks.decoding import quiet_pillow
from lorabank.tasks.images.pictures import Picture, named, open_picture
from lorabank.tasks.images.preprocess import Preprocess

THREADS = max(1, min(8, os.cpu_count() or 1))
"""That decode pictures: Pillow lets go of the interpreter meanwhile."""
_AHEAD = 256
"""Pictures in work at once."""
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class ImageRow:
    """A picture that was read once and can be used."""

    picture: Picture = field(compare=False, repr=False)
    digest: str
    """Of its file."""
    label: str | None
    """The label's name; None where it has none to predict from."""
    origin: str
    """The file, or `row N of …`."""
    size: int = 1
    group: str | None = field(default=None, compare=False)
    """Value of the column `data.group_by`, if one is set."""

    @property
    def prompt_text(self) -> str:
        """For people: where it is."""
        return self.origin

    @property
    def reference(self) -> str:
        """For people: what it shows."""
        return self.label or ""

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.digest, self.label


class PixelStore:
    """Prepared pictures by their digest, as many as fit into `limit` bytes; the others are read again when they are needed."""

    def __init__(self, preprocess: Preprocess, limit: float) -> None:
        self.preprocess = preprocess
        self._left = limit
        self._kept: dict[str, Tensor] = {}

    def keep(self, digest: str, pixels: Tensor) -> None:
        """Keep the pixels (C, H, W) if they fit."""
        size = pixels.numel() * pixels.element_size()
        if digest not in self._kept and size <= self._left:
            self._kept[digest] = pixels
            self._left -= size

    def stacked(self, rows: Sequence[ImageRow]) -> Tensor:
        """uint8 (N, C, H, W). Raises DataError for a file that was changed, or is gone, since it was checked."""
        missing = [row for row in rows if row.digest not in self._kept]
        read: dict[str, Tensor] = {}
        if missing:
            with quiet_pillow():
                read = dict(zip((row.digest for row in missing), in_order(self._again, missing), strict=True))
        return torch.stack([self._kept[row.digest] if row.digest in self._kept else read[row.digest] for row in rows])

    def _again(self, row: ImageRow) -> Tensor:
        try:
            picture, digest = open_picture(row.picture)
        except RowError as error:
            raise DataError(
                f"{named(row.origin, row.picture)}: {error.reason}, though it was fine when the run began. Put it back."
            ) from error
        if digest != row.digest:
            raise DataError(f"{named(row.origin, row.picture)}: its content is another than when the run began. Put it back.")
        return self.preprocess.pixels(picture)


def in_order(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`work` of each item, by several threads, in the order of the items; no more than a few hundred are held."""
    items = list(items)
    if len(items) < 2 or THREADS == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(THREADS, thread_name_prefix="pictures") as pool:
        for start in range(0, len(items), _AHEAD):
            yield from pool.map(work, items[start : start + _AHEAD])
