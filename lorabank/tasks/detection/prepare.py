"""`prepare`: from sources to checked pictures with boxes in splits, with a report. All are decoded before any training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.hold_out import hold_out
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.row import RowError
from lorabank.data.row_report import Splits, row_report
from lorabank.data.sources import left_aside, main_part, sources_of
from lorabank.tasks.decoding import quiet_pillow
from lorabank.tasks.detection.boxes import check_boxes
from lorabank.tasks.detection.entries import Entry, Found
from lorabank.tasks.detection.pictures import open_picture
from lorabank.tasks.detection.report import boxless, facts, notes, refused
from lorabank.tasks.detection.rows import Box, DetectionRow
from lorabank.tasks.detection.sources import find_pictures

Keep = Callable[[str, bool, Image.Image], None]
"""(digest, whether turned upright, RGB): a picture that was opened, to prepare while it is there."""
CONTRADICTED = "listed more than once, with other boxes each time: put all boxes of a picture into one entry"
_AHEAD = 128
_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class DetectionSets(Splits[DetectionRow]):
    """One data set's pictures."""

    labels: tuple[str, ...]
    """Categories in the order of a head's outputs."""
    category_ids: Mapping[str, int]
    """Of categories that came with numbers; empty for others."""
    errors: Sequence[RowError]
    """One for each picture that was left out, with its file."""


@dataclass(frozen=True)
class _Opened:
    row: DetectionRow | None
    error: RowError | None
    faults: Sequence[str] = ()


def prepare(
    data: DataConfig,
    detection: DetectionConfig,
    *,
    seed: int,
    train: Source | None,
    val: Source | None,
    keep: Keep,
    labels: Sequence[str] | None = None,
    boxed: bool = True,
    progress: Progress | None = None,
) -> DetectionSets:
    """Find, open, check and split. `labels`: a head's own, where it has some. `boxed` False: pictures alone, to predict.

    Pictures and boxes that can't be used are left out and counted, or refused by name, as `data.bad_rows` and
    `detection.bad_boxes` say. Raises DataError, also where no picture, or no box to learn from, is left.
    """
    sources = sources_of(data, train, val, expected="a COCO file, a folder or a table")
    found = {
        role: find_pictures(
            source,
            role=role,
            images=detection.images,
            boxed=boxed,
            limit=data.limit,
            group_by=data.group_by if role == "train" else None,
        )
        for role, source in sources.items()
    }
    if not boxed:
        found = {role: Found(entries=[replace(each, boxes=()) for each in part.entries]) for role, part in found.items()}
    known = labels or detection.labels
    opened = {role: _without_contradicted(part) for role, part in _open(found, detection, known, keep, progress).items()}
    total = sum(map(len, opened.values()))
    errors = [each.error for part in opened.values() for each in part if each.error is not None]
    refuse(errors, total, data, what="pictures")
    faults = _faults(opened)
    if faults and detection.bad_boxes == "stop":
        raise refused(faults)
    parts = {role: [each.row for each in part if each.row is not None] for role, part in opened.items()}
    for role, part in parts.items():
        if not part:
            own = [each.error for each in opened[role] if each.error is not None]
            raise nothing_left(role, len(opened[role]), own, what="pictures")
    splits = _split(data, parts, seed)
    role = main_part(parts)
    main, declared = splits[role], found[role]
    names = known or _labels(declared, main)
    if boxed and not any(not box.crowd for row in main for box in row.boxes):
        raise boxless(role, main, faults, found)
    return DetectionSets(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        report=row_report(
            read=total,
            errors=errors,
            splits=splits,
            facts=[*facts(main, names, trained=role == "train"), *left_aside(sources)] if boxed else (),
            notes=notes(found, faults, splits),
            what="pictures",
        ),
        errors=errors,
        labels=tuple(names),
        category_ids={name: number for number, name in declared.names.items() if name in names},
    )


def _open(
    found: Mapping[str, Found], detection: DetectionConfig, known: Sequence[str] | None, keep: Keep, progress: Progress | None
) -> dict[str, list[_Opened]]:
    total, done = sum(len(part.entries) for part in found.values()), 0
    opened: dict[str, list[_Opened]] = {}
    # Pillow lets go of the interpreter meanwhile
    with quiet_pillow(), ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures") as pool:
        for role, part in found.items():
            opened[role] = []

            def look(entry: Entry, names: Mapping[int, str] = part.names) -> _Opened:
                return _one(entry, names, known, detection, keep)

            for start in range(0, len(part.entries), _AHEAD):
                ahead = part.entries[start : start + _AHEAD]
                opened[role] += pool.map(look, ahead)
                done += len(ahead)
                if progress is not None:
                    progress(done, total)
    return opened


def _one(entry: Entry, names: Mapping[int, str], known: Sequence[str] | None, detection: DetectionConfig, keep: Keep) -> _Opened:
    if entry.picture is None:
        return _Opened(None, (entry.error or RowError("no picture")).at(entry.origin))
    try:
        picture, upright, digest = open_picture(entry.picture, entry.size)
    except RowError as error:
        return _Opened(None, error.at(entry.origin))
    boxes, faults = check_boxes(
        entry.boxes,
        picture.size,
        names=names,
        known=known,
        min_box=detection.min_box,
        clip=detection.bad_boxes == "clip",
    )
    keep(digest, upright, picture)
    row = DetectionRow(
        picture=entry.picture,
        upright=upright,
        digest=digest,
        width=picture.width,
        height=picture.height,
        boxes=tuple(boxes),
        origin=entry.origin,
        image_id=entry.image_id,
        group=entry.group,
    )
    return _Opened(row, None, faults)


def _without_contradicted(opened: Sequence[_Opened]) -> list[_Opened]:
    """Entries of one file that say different boxes are bad ones, all of them: which boxes are that picture's, nothing says."""
    files = [None if each.row is None else _file_of(each.row) for each in opened]
    said: dict[str, set[frozenset[Box]]] = {}
    for each, file in zip(opened, files, strict=True):
        if each.row is not None and file is not None:
            said.setdefault(file, set()).add(frozenset(each.row.boxes))
    return [
        _Opened(None, _contradicted(each.row)) if each.row and file and len(said[file]) > 1 else each
        for each, file in zip(opened, files, strict=True)
    ]


def _contradicted(row: DetectionRow) -> RowError:
    return RowError(CONTRADICTED, f"{row.origin} as image_id {row.image_id}")


def _file_of(row: DetectionRow) -> str | None:
    return os.path.realpath(row.picture) if isinstance(row.picture, Path) else None


def _faults(opened: Mapping[str, Sequence[_Opened]]) -> list[RowError]:
    """One for every box that isn't as it should be."""
    rows = [(each.row, each.faults) for part in opened.values() for each in part if each.row is not None]
    return [RowError(why, row.origin) for row, faults in rows for why in faults]


def _labels(found: Found, rows: Sequence[DetectionRow]) -> list[str]:
    """The declared ones in the order of their numbers, or those of the boxes, sorted."""
    if found.names:
        return list(dict.fromkeys(found.names[number] for number in sorted(found.names)))
    return sorted({box.label for row in rows for box in row.boxes}, key=_order)


def _order(label: str) -> tuple[bool, int, str]:
    """Numbers by their value, before names."""
    return not label.isdigit(), int(label) if label.isdigit() else 0, label


def _split(data: DataConfig, parts: Mapping[str, list[DetectionRow]], seed: int) -> dict[str, list[DetectionRow]]:
    keys = [row.digest if row.group is None else row.group for row in parts.get("train", ())]
    return hold_out(parts, keys, data, seed=seed, unit="pictures").splits
