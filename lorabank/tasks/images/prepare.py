"""`prepare_images`: from sources to checked rows in splits, with a report. Every picture is decoded here, before any training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lorabank.config.images import ImagesConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.hold_out import dealt, shares_of
from lorabank.data.read import Source
from lorabank.data.row import RowError
from lorabank.data.sources import all_scored, left_aside, main_part, sources_of
from lorabank.data.split import group_unit, split_rows
from lorabank.data.stratified import Stratified, stratified_rows
from lorabank.errors import DataError, closest
from lorabank.tasks.decoding import quiet_pillow
from lorabank.tasks.images.pictures import named, open_picture
from lorabank.tasks.images.report import ImageReport, build_report
from lorabank.tasks.images.rows import ImageRow, PixelStore, in_order
from lorabank.tasks.images.sources import Columns, Found, find_pictures
from lorabank.tasks.images.walk import natural

Progress = Callable[[int, int], None]
"""Called with pictures done and pictures in all."""


@dataclass(frozen=True)
class PreparedImages:
    """Rows ready to be batched, and the labels that they may have."""

    train: list[ImageRow]
    val: list[ImageRow]
    test: list[ImageRow]
    report: ImageReport
    labels: tuple[str, ...]
    """In the order of a head's outputs."""


@dataclass(frozen=True)
class _Opened:
    """A picture that was looked at."""

    row: ImageRow | None
    error: RowError | None
    size: tuple[int, int] = (0, 0)


def prepare_images(
    data: DataConfig,
    images: ImagesConfig,
    store: PixelStore,
    *,
    seed: int,
    train: Source | None = None,
    val: Source | None = None,
    labels: Sequence[str] | None = None,
    scoring: bool = False,
    progress: Progress | None = None,
) -> PreparedImages:
    """Find, open, check and split.

    `train` and `val` (a folder, a table, a `datasets` id or object, or a list of dicts) override the paths of `data`. `labels`: a
    head's own, where it has some; else `images.labels`, else those of the training pictures. `scoring`: nothing is trained, so
    some may be missing. Pictures that can't be used are counted in the report by reason, or refused, by `data.bad_rows`; NaN by
    `data.nan_rows`. Splits are by class. Raises DataError, also where no picture is left.
    """
    sources = sources_of(data, train, val, expected="a folder, a table or a data set id")
    columns = Columns(image=images.image_column, label=images.label_column)
    grouped = replace(columns, group=data.group_by)
    found = {
        role: find_pictures(source, role=role, columns=grouped if role == "train" else columns, limit=data.limit)
        for role, source in sources.items()
    }
    empty = [each.origin for part in found.values() for each in part if each.empty]
    found = {role: [each for each in part if not each.empty] for role, part in found.items()}
    opened = _open(found, images, store, progress)
    known = labels or images.labels
    if known is None:
        names = {each.row.label for each in opened[main_part(opened)] if each.row is not None and each.row.label is not None}
        known = sorted(names, key=natural)
    checked = {role: [_labelled(each, known) for each in part] for role, part in opened.items()}
    errors = {role: [each.error for each in part if each.error is not None] for role, part in checked.items()}
    total = sum(map(len, found.values()))
    refuse([e for part in errors.values() for e in part], total, data, what="pictures")
    rows = {role: [each.row for each in part if each.row is not None] for role, part in checked.items()}
    for role, part in rows.items():
        if not part:
            raise nothing_left(role, len(found[role]), errors[role], what="pictures")
    splits, notes = _split(data, rows, seed)
    notes["class folders without a picture"] = empty
    if not scoring and "train" in sources:  # nothing is trained of a model that is scored by itself, either
        _check_classes(known, splits["train"], notes)
    report = build_report(
        read=total,
        errors=[e for part in errors.values() for e in part],
        splits=splits,
        labels=known,
        sizes=[each.size for part in checked.values() for each in part if each.row is not None],
        notes=notes,
        facts=left_aside(sources),
    )
    return PreparedImages(splits["train"], splits["val"], splits["test"], report, tuple(known))


def _open(
    found: Mapping[str, Sequence[Found]], images: ImagesConfig, store: PixelStore, progress: Progress | None
) -> dict[str, list[_Opened]]:
    total, done = sum(map(len, found.values())), 0
    opened: dict[str, list[_Opened]] = {}

    def look(each: Found) -> _Opened:
        return open_found(each, images.min_size, store)

    with quiet_pillow():
        for role, part in found.items():
            opened[role] = []
            for each in in_order(look, part):
                opened[role].append(each)
                done += 1
                if progress is not None:
                    progress(done, total)
    return opened


def open_found(each: Found, min_size: int, store: PixelStore) -> _Opened:
    """Open one picture, and keep its pixels where there is room; what is wrong with it otherwise."""
    if each.picture is None:
        error = each.error or RowError("no picture")
        return _Opened(None, error.at(each.origin))
    try:
        picture, digest = open_picture(each.picture, min_size=min_size)
    except RowError as error:
        return _Opened(None, error.at(named(each.origin, each.picture)))
    store.keep(digest, store.preprocess.pixels(picture))
    return _Opened(ImageRow(each.picture, digest, each.label, each.origin, group=each.group), None, picture.size)


def _labelled(each: _Opened, known: Collection[str]) -> _Opened:
    if each.row is None or each.row.label in known:
        return each
    label = each.row.label or ""
    return _Opened(None, RowError(f"label {label!r} is none of the {len(known)} known{closest(label, known)}", each.row.origin))


def _split(
    data: DataConfig, rows: Mapping[str, list[ImageRow]], seed: int
) -> tuple[dict[str, list[ImageRow]], dict[str, list[str]]]:
    """Hold pictures out of the training source for each split that has no source of its own."""
    if "train" not in rows:
        return all_scored(rows["test"]), {}
    source = rows["train"]
    shares = shares_of(rows, data, few=len({row.digest for row in source}) <= len({row.label for row in source}))
    val, test = shares.val, shares.test
    notes: dict[str, list[str]] = {}
    if shares.spared:
        notes["too few pictures to hold any out for validation"] = [row.origin for row in source]
    if data.group_by is not None:  # a value's pictures may be of several classes, so classes can't have their shares
        unit = group_unit(data.group_by, "pictures")
        made = Stratified(split_rows([str(row.group) for row in source], val=val, test=test, seed=seed, unit=unit), ())
    else:
        made = stratified_rows([row.digest for row in source], [row.label or "" for row in source], val=val, test=test, seed=seed)
    if made.undivided:
        few = {label: [row.origin for row in source if row.label == label] for label in made.undivided}
        note = "classes with too few pictures to hold one out, all trained on"
        notes[note] = [f"{label}: {origins[0]}" for label, origins in few.items()]
    return dealt(rows, made.split), notes


def _check_classes(known: Sequence[str], train: Sequence[ImageRow], notes: dict[str, list[str]]) -> None:
    present = {row.label for row in train}
    if len(known) < 2:
        raise DataError(f"data: expected pictures of at least two classes, got {', '.join(known) or 'none'} alone")
    if absent := [label for label in known if label not in present]:
        notes["labels without a training picture"] = absent
