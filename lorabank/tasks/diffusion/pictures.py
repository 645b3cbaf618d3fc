"""Pictures with captions: found, opened, checked, each with the size that it will be trained at.

Forms: a folder of pictures with a `.txt` of the same name beside each; a folder with `metadata.jsonl` or `.csv` (columns
`file_name` and `text`, as the datasets library has it); such a file itself; rows with `image` (a path, a PIL image, or bytes) and
a caption, in a list or a `datasets.Dataset`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.paths import expanded
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refusal, refuse
from lorabank.data.files import read_text
from lorabank.data.formats import MISSING_WORD, checked_text, is_missing_word, refuse_nan
from lorabank.data.listing import is_file, is_folder, listed
from lorabank.data.read import Source, read_rows
from lorabank.data.repository import Part, is_saved, part_of
from lorabank.data.row import RowError
from lorabank.data.split import group_of
from lorabank.errors import DataError, Setting, closest, first_line
from lorabank.tasks.decoding import as_rgb, decoded, quiet_pillow, upright
from lorabank.tasks.diffusion.buckets import Fit, Size, buckets_of, fit, fitted, nearest
from lorabank.tasks.picture_bytes import SUFFIXES, UNREAD, content, unread

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTIONS = ("text", "caption", "prompt")
FILES = ("file_name", "image", "file", "path")
UNREADABLE, TINY, UNTITLED = "can't be read as a picture", "is tiny", "has no caption"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture with its caption."""

    caption: str
    origin: str
    fit: Fit
    original: Size
    digest: str
    """Of the file's bytes (or of the pixels, where there is no file)."""
    source: Any = field(repr=False, compare=False)
    """Path, bytes or PIL image."""
    prior: bool = False
    """Whether it is one of the class that an object belongs to."""
    group: str | None = field(default=None, compare=False)
    """Value of the column `data.group_by`, if one is set."""

    @property
    def size(self) -> int:
        """Latents, about: one number for each 8 × 8 pixels. Portraits count one more, so that rows of a shape are gathered."""
        bucket = self.fit.bucket
        return max(1, bucket.pixels // 64) + (bucket.height > bucket.width)

    @property
    def prompt_text(self) -> str:
        """The caption."""
        return self.caption

    @property
    def reference(self) -> str:
        """The picture's name."""
        return self.origin

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.digest, self.caption, self.fit, self.prior

    def load(self) -> Image.Image:
        """The picture at its bucket's size, RGB. Raises DataError where its file has changed or gone since it was checked."""
        try:
            picture, digest = opened(self.source)
        except RowError as error:
            raise DataError(f"{self.origin}: {error.reason}, though it was fine when the run began. Put it back.") from error
        if digest != self.digest:
            raise DataError(f"{self.origin}: its content is another than when the run began. Put it back.")
        return fitted(picture, self.fit)


@dataclass(frozen=True)
class Found:
    """A picture before it was opened."""

    source: Any
    caption: Any
    """As its column has it, or the path of a file that holds it; None: there is none."""
    origin: str
    group: str | None = None
    column: str = "caption"
    error: RowError | None = None
    """Why it can't be a picture to train on, seen from its name."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a source gave."""

    pictures: Sequence[Picture]
    errors: Sequence[RowError]
    """Of pictures that were left out."""
    notes: Mapping[str, Sequence[str]]
    """Sentence to the pictures that it is about."""

    @property
    def total(self) -> int:
        """Pictures that there were."""
        return len(self.pictures) + len(self.errors)


def read_pictures(
    source: Source,
    data: DataConfig,
    config: DiffusionConfig,
    *,
    step: int,
    role: str = "train",
    group_by: str | None = None,
    busy: Any = None,
) -> Read:
    """Open and check every picture of a source. `step`: what sides must be a multiple of. `busy(done, total)`: progress.
    `group_by`: column whose value a row keeps.

    Raises DataError, which names the files, where `data.bad_rows` or `diffusion.no_caption` says `stop`.
    """
    found = list(find_pictures(source, config, role=role, group_by=group_by))[: data.limit]
    if not found:
        raise DataError(f"{source}: no pictures there ({' '.join(SUFFIXES)})")
    sizes = buckets_of(config.resolution, step=step, max_aspect=config.max_aspect)
    if not config.buckets:
        side = max(step, config.resolution // step * step)
        sizes = (Size(side, side),)
    pictures: list[Picture] = []
    errors: list[RowError] = []
    notes: dict[str, list[str]] = {}
    for number, each in enumerate(found, start=1):
        try:
            picture = _checked(each, config, sizes)
        except RowError as error:
            errors.append(error.at(each.origin))
        else:
            pictures.append(picture)
            for note in _notes(picture):
                notes.setdefault(note, []).append(picture.origin)
        if busy is not None:
            busy(number, len(found))
    untitled = [error for error in errors if error.reason == UNTITLED]
    refuse([error for error in errors if error.reason != UNTITLED], len(found), data, what="pictures")
    if untitled and config.no_caption == "stop":
        ways = "drop, which leaves them out and counts them, or to empty, which trains them without one"
        raise refusal(untitled, len(found), "diffusion.no_caption", ways, what="pictures")
    if not pictures:
        raise nothing_left(role, len(found), errors, what="pictures")
    return Read(pictures=pictures, errors=errors, notes=notes)


def _checked(found: Found, config: DiffusionConfig, sizes: tuple[Size, ...]) -> Picture:
    if found.error is not None:
        raise found.error
    if found.source is None:
        raise RowError("names no picture")
    picture, digest = opened(found.source)
    if min(picture.size) < config.min_side:
        raise RowError(f"{TINY} ({picture.width} × {picture.height}; diffusion.min_side is {config.min_side})")
    caption = _caption(found)
    if not caption and config.no_caption != "empty":
        raise RowError(UNTITLED)
    if config.trigger:
        caption = f"{config.trigger} {caption}".strip()
    bucket = nearest(sizes, picture.height, picture.width)
    how = fit(bucket, picture.height, picture.width)
    return Picture(
        caption=caption,
        origin=found.origin,
        fit=how,
        original=Size(picture.height, picture.width),
        digest=digest,
        source=found.source,
        group=found.group,
    )


def _caption(found: Found) -> str:
    """On one line where it is a file's. Raises RowError for what is no text or can't be read, NanError for NaN."""
    given = found.caption
    if not isinstance(given, Path):
        refuse_nan(given, found.column)
        return "" if given is None else checked_text(given, f"column {found.column!r}", may_be_empty=True).strip()
    try:
        return " ".join(read_text(given).split())
    except DataError as error:
        raise RowError(f"the .txt beside it can't be read ({first_line(error).removeprefix(str(given)).lstrip(':')})") from error


def _notes(picture: Picture) -> list[str]:
    """What a user should know of a picture that is used."""
    notes = []
    if picture.fit.scaled.pixels > picture.original.pixels * 1.02:
        notes.append("enlarged, since they have fewer pixels than they are trained at")
    if picture.fit.bucket.pixels < 0.5 * picture.fit.scaled.pixels:
        notes.append("cropped by more than half (diffusion.max_aspect)")
    if not picture.caption:
        notes.append("trained without a caption")
    if is_missing_word(picture.caption):
        notes.append(MISSING_WORD)
    return notes


def opened(source: Any) -> tuple[Image.Image, str]:
    """(the picture upright, in RGB, on white where it is transparent; its digest). Raises RowError."""
    try:
        if isinstance(source, Image.Image):
            seen = as_rgb(upright(source))
            return seen, hashlib.sha256(repr((seen.mode, seen.size)).encode() + seen.tobytes()).hexdigest()
        data = source if isinstance(source, bytes) else content(Path(source))
        with quiet_pillow():
            return as_rgb(upright(decoded(data))), hashlib.sha256(data).hexdigest()
    except RowError:
        raise
    except (OSError, ValueError) as error:  # a picture that was given open, and isn't any more
        raise RowError(f"{UNREADABLE} ({first_line(error)})") from error


# ---- where they are --------------------------------------------------------------------------------------------------


def find_pictures(source: Source, config: DiffusionConfig, *, role: str, group_by: str | None = None) -> Iterator[Found]:
    """Pictures of a source with their captions, nothing opened yet."""
    if not isinstance(source, str | Path):
        yield from _from_rows(((row.values, row.origin) for row in read_rows(source, role=role)), config, None, group_by)
        return
    path = expanded(str(source), place=f"data.{role}", kind=DataError)
    part = part_of(path, role, loose=SUFFIXES) if path.is_dir() else Part(path.parent, (path,) if path.exists() else ())
    tables = part.tables or tuple(part.folder / name for name in METADATA if path.is_dir() and is_file(part.folder / name))[:1]
    if path.is_dir() and not tables and not is_saved(part.folder):
        group_of({}, group_by, str(part.folder))  # a folder has no columns
        yield from _from_folder(part.folder)
        return
    rows = [row for table in tables or (str(source),) for row in read_rows(table, role=role)]
    yield from _from_rows(((row.values, row.origin) for row in rows), config, part.folder if tables else None, group_by)


def _from_folder(folder: Path) -> Iterator[Found]:
    """Every picture below a folder, by name, and the `.txt` beside it."""
    for path in sorted(_files(folder)):
        kind = path.suffix.lower()
        if path.name[0] == ".":
            continue
        if kind in SUFFIXES:
            text = path.with_suffix(".txt")
            yield Found(path, text if is_file(text) else None, str(path))
        elif kind in UNREAD:
            yield Found(None, None, str(path), error=RowError(unread(kind)))


def _files(folder: Path) -> Iterator[Path]:
    """Below a folder, links to folders aside. Raises DataError for one that can't be read."""
    for path in listed(folder):
        if is_file(path):
            yield path
        elif is_folder(path) and not path.is_symlink():
            yield from _files(path)


def _from_rows(
    rows: Iterable[tuple[Mapping[str, Any], str]], config: DiffusionConfig, folder: Path | None, group_by: str | None
) -> Iterator[Found]:
    named, columns = False, list[str]()
    for values, origin in rows:
        known = list(values)
        columns += [name for name in known if name not in columns]
        if config.caption is not None and config.caption not in values:
            raise DataError(
                f"diffusion.caption: {origin} has no column {config.caption!r}{closest(config.caption, known)}. "
                f"It has: {', '.join(known)}."
            )
        column = config.caption or next((name for name in CAPTIONS if name in values), None)
        named = named or column is not None
        file = next((name for name in FILES if values.get(name) is not None), None)
        if file is None and not any(name in values for name in FILES):
            raise DataError(f"{origin}: no picture: expected a column {' or '.join(FILES)}, got {', '.join(known)}.")
        caption = values[column] if column is not None else None
        if isinstance(caption, Sequence) and not isinstance(caption, str):
            caption = caption[0] if caption else None
        source = None if file is None else _source(values[file], folder)
        shown = f"{source} ({origin})" if isinstance(source, Path) else origin
        yield Found(source, caption, shown, group_of(values, group_by, origin), column or "caption")
    if columns and not named and config.no_caption != "empty":
        raise DataError(
            f"no column of captions: expected {', '.join(CAPTIONS)}, got {', '.join(columns)}. Name it with ",
            Setting("diffusion.caption"),
            "; or set ",
            Setting("diffusion.no_caption"),
            " to empty, to train without captions.",
        )


def _source(value: Any, folder: Path | None) -> Any:
    """A path, bytes or a PIL image, out of a column's value."""
    if isinstance(value, Mapping):  # as the datasets library keeps pictures undecoded
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        path = Path(value)
        return path if path.is_absolute() or folder is None else folder / path
    return value
