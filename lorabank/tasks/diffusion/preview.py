"""What `lorabank preview` shows of pictures with captions: tokens, sizes, and what the crop keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from lorabank.data.preview import Printer
from lorabank.tasks.diffusion.pictures import Picture, opened
from lorabank.tasks.sheet import png, sheet
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.diffusion.task import TextToImage

FILE = "pictures.png"
FRAME = (213, 94, 0)


def preview(task: TextToImage, rows: Sequence[Picture], out: Printer) -> Mapping[str, bytes]:
    """A title and the caption a row, and one sheet."""
    for row in rows:
        out.title(f"{row.origin}: {_sizes(row)}")
        out.line(f"caption: {row.caption or '(none)'}")
        for encoder, (count, length) in task.images.token_counts(row.caption).items():
            cut = f", cut to {length}: what comes later isn't read" if count > length else f" of at most {length}"
            out.line(f"{encoder}: {counted(count, 'token')}{cut}")
    columns = {"as it is, the crop framed": [_framed(row) for row in rows], "as training has it": [row.load() for row in rows]}
    return {FILE: png(sheet(columns, [row.caption for row in rows]))}


def _sizes(row: Picture) -> str:
    how = row.fit
    scaled = f"{row.original} scaled to {how.scaled}" if how.scaled != row.original else str(row.original)
    across, down = how.scaled.width - how.bucket.width, how.scaled.height - how.bucket.height
    cut = f", {across or down} pixels of its {'width' if across else 'height'} cropped" if across or down else ""
    return f"{scaled}{cut}: bucket {how.bucket}"


def _framed(row: Picture) -> Image.Image:
    """The whole picture, with a line around what is kept of it."""
    how = row.fit
    picture = opened(row.source)[0].resize((how.scaled.width, how.scaled.height), Image.Resampling.LANCZOS)
    box = (how.left, how.top, how.left + how.bucket.width - 1, how.top + how.bucket.height - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=max(2, min(picture.size) // 100))
    return picture
