"""`prepare`: from sources to checked pictures with boxes in splits, with a report. All are decoded before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from PIL import Image

from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.report import MAX_ORIGINS
from lorabank.data.row import RowError
from lorabank.data.row_report import Splits, row_report
from lorabank.data.split import group_unit, split_rows
from lorabank.errors import DataError
from lorabank.tasks.detection.boxes import check_boxes
from lorabank.tasks.detection.pictures import open_picture
from lorabank.tasks.detection.rows import DetectionRow
from lorabank.tasks.detection.sources import SPLITS, Entry, Found, find_pictures

Keep = Callable[[str, bool, Image.Image], None]
"""(digest, whether turned upright, RGB): a picture that was opened, to prepare while it is there."""
_AHEAD = 128
_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class DetectionSets(Splits[DetectionRow]):
    """One data set's pictures."""

    labels: tuple[str, ...]
    """Categories in the order of a head's outputs."""
    category_ids: Mapping[str, int]
    """Of categories that came with numbers; empty for others."""


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
    scoring: bool = False,
    progress: Progress | None = None,
) -> DetectionSets:
    """Find, open, check and split. `labels`: a head's own, where it has some. `boxed` False: pictures alone, to predict.
    `scoring`: nothing is trained, so the report speaks of no training.

    Pictures and boxes that can't be used are left out and counted, or stop it with their names, as `detection.bad_pictures` and
    `detection.bad_boxes` say. Raises DataError, also where no picture, or no box to learn from, is left.
    """
    sources = {"train": data.train if train is None else train, "val": data.val if val is None else val, "test": data.test}
    if sources["train"] is None:
        raise DataError("no training data: set data.train to a COCO file, a folder or a table, or pass the rows themselves")
    if boxed:
        sources = {role: _held_beside(sources["train"], role) if source is None else source for role, source in sources.items()}
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
        if source is not None
    }
    if not boxed:
        found = {role: replace(part, entries=[replace(each, boxes=()) for each in part.entries]) for role, part in found.items()}
    known = labels or detection.labels
    opened = _open(found, detection, known, keep, progress)
    total = sum(map(len, opened.values()))
    errors = [each.error for part in opened.values() for each in part if each.error is not None]
    _refuse(opened, errors, detection)
    parts = {role: [each.row for each in part if each.row is not None] for role, part in opened.items()}
    for role, part in parts.items():
        if not part:
            why = next(each.error for each in opened[role] if each.error is not None)
            raise DataError(f"{role} data: none of the {len(opened[role]):,} pictures can be used: {why}")
    splits = _split(data, parts, seed)
    names = known or _labels(found["train"], splits["train"])
    if boxed and not any(not box.crowd for row in splits["train"] for box in row.boxes):
        count = len(splits["train"])
        raise DataError(
            f"train data: none of the {count:,} pictures has a box: nothing to learn from, or to score.{_hint(opened)}"
        )
    return DetectionSets(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        report=row_report(
            read=total,
            errors=errors,
            splits=splits,
            facts=_facts(splits["train"], names, scoring) if boxed else (),
            notes=_notes(found, opened),
            what="pictures",
        ),
        labels=tuple(names),
        category_ids={name: number for number, name in found["train"].names.items() if name in names},
    )


def _held_beside(source: Source, role: str) -> Source | None:
    """The `valid` or `test` folder beside the `train` folder that a source holds."""
    if role == "train" or not isinstance(source, str):
        return source if role == "train" else None
    from lorabank.config.paths import expanded

    folder = expanded(source, place="data.train", kind=DataError)
    if not folder.is_dir() or not any((folder / name).is_dir() for name in SPLITS["train"]):
        return None
    return next((str(folder / name) for name in SPLITS[role] if (folder / name).is_dir()), None)


def _open(
    found: Mapping[str, Found], detection: DetectionConfig, known: Sequence[str] | None, keep: Keep, progress: Progress | None
) -> dict[str, list[_Opened]]:
    total, done = sum(len(part.entries) for part in found.values()), 0
    opened: dict[str, list[_Opened]] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures") as pool:  # Pillow lets go of the interpreter meanwhile
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


def _refuse(opened: Mapping[str, Sequence[_Opened]], errors: Sequence[RowError], detection: DetectionConfig) -> None:
    if errors and detection.bad_pictures == "stop":
        listed = _listed([(error.reason, error.origin) for error in errors])
        raise DataError(
            f"data: {len(errors):,} pictures can't be used:{listed}\n"
            "Correct or delete them. Or set `detection.bad_pictures: drop`, which leaves them out and counts them."
        )
    faults = _faults(opened)
    if faults and detection.bad_boxes == "stop":
        raise DataError(
            f"data: {len(faults):,} boxes can't be used as they are:{_listed([(f'boxes {why}', at) for why, at in faults])}\n"
            "Correct them. Or set `detection.bad_boxes: clip` (or drop), which counts them."
        )


def _faults(opened: Mapping[str, Sequence[_Opened]]) -> list[tuple[str, str]]:
    """(why, where) of every box that isn't as it should be."""
    return [(why, each.row.origin) for part in opened.values() for each in part if each.row is not None for why in each.faults]


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for why, where in pairs:
        reasons.setdefault(why, []).append(where)
    lines = []
    for why, places in sorted(reasons.items(), key=lambda item: -len(item[1])):
        first = list(dict.fromkeys(places))
        lines.append(
            f"\n  - {len(places):,} × {why} ({', '.join(first[:MAX_ORIGINS])}{', …' if len(first) > MAX_ORIGINS else ''})"
        )
    return "".join(lines)


def _hint(opened: Mapping[str, Sequence[_Opened]]) -> str:
    faults = _faults(opened)
    return f" Boxes that were left out:{_listed(faults)}" if faults else ""


def _notes(found: Mapping[str, Found], opened: Mapping[str, Sequence[_Opened]]) -> dict[str, list[str]]:
    counts = Counter(why for why, _ in _faults(opened))
    notes: dict[str, list[str]] = {}
    for why, count in counts.most_common():
        left = "" if why.endswith("cut off") else ", left out"
        places = [where for reason, where in _faults(opened) if reason == why]
        notes[f"{count:,} {'box' if count == 1 else 'boxes'} {why}{left}"] = list(dict.fromkeys(places))
    if stray := [where for part in found.values() for where in part.stray]:
        notes["annotations of pictures that the file doesn't list, left out"] = stray
    return notes


def _facts(rows: Sequence[DetectionRow], labels: Sequence[str], scoring: bool) -> list[str]:
    counts = Counter(box.label for row in rows for box in row.boxes)
    if not counts:
        return []
    shown = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(8))
    shown += ", …" if len(counts) > 8 else ""
    if scoring:
        return [f"{sum(counts.values()):,} boxes: {shown}"]
    facts = [f"{len(labels)} categories, {sum(counts.values()):,} boxes in training: {shown}"]
    if empty := sum(not row.boxes for row in rows):
        facts.append(f"{empty:,} training pictures without a box: they teach what is nothing")
    if absent := [label for label in labels if label not in counts]:
        facts.append(
            f"{len(absent)} categories without a training box: {', '.join(absent[:8])}{', …' if len(absent) > 8 else ''}"
        )
    return facts


def _labels(found: Found, rows: Sequence[DetectionRow]) -> list[str]:
    """The declared ones in the order of their numbers, or those of the boxes, sorted."""
    if found.names:
        return list(dict.fromkeys(found.names[number] for number in sorted(found.names)))
    return sorted({box.label for row in rows for box in row.boxes}, key=_order)


def _order(label: str) -> tuple[bool, int, str]:
    """Numbers by their value, before names."""
    return not label.isdigit(), int(label) if label.isdigit() else 0, label


def _split(data: DataConfig, parts: Mapping[str, list[DetectionRow]], seed: int) -> dict[str, list[DetectionRow]]:
    rows = parts["train"]
    val = 0 if "val" in parts else data.val_split
    test = 0 if "test" in parts else data.test_split
    keys = [row.digest if row.group is None else row.group for row in rows]
    if val == DataConfig.val_split and len(set(keys)) == 1:
        val = 0  # the default share was nobody's demand
    split = split_rows(keys, val=val, test=test, seed=seed, unit=group_unit(data.group_by, "pictures"))
    held = {"val": split.val, "test": split.test}
    return {
        "train": [rows[i] for i in split.train],
        **{role: parts[role] if role in parts else [rows[i] for i in held[role]] for role in ("val", "test")},
    }
