"""What is said of a data set of boxes: facts, notes, and errors that name boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lorabank.data.bad_rows import NAMED, listed
from lorabank.data.reasons import MAX_ORIGINS
from lorabank.data.row import RowError
from lorabank.errors import DataError, Setting
from lorabank.tasks.detection.entries import Found
from lorabank.tasks.detection.rows import DetectionRow
from lorabank.wording import counted


def refused(faults: Sequence[RowError]) -> DataError:
    """The error that names boxes which can't be used as they are."""
    return DataError(
        f"data: {counted(len(faults), 'box', 'boxes')} can't be used unchanged:{listed(faults, NAMED)}\nCorrect them, or set ",
        Setting("detection.bad_boxes"),
        " to clip or drop, which count them.",
    )


def boxless(role: str, rows: Sequence[DetectionRow], faults: Sequence[RowError], found: Mapping[str, Found]) -> DataError:
    """The error for pictures none of which has a box that counts."""
    none = f"none of the {len(rows):,} pictures" if len(rows) != 1 else "not the only picture"
    said = f"{role} data: {none} has a box: nothing to learn from, or to score."
    if crowds := sum(box.crowd for row in rows for box in row.boxes):
        all_crowds = counted(crowds, "box is a crowd", "boxes are crowds")
        said = (
            f"{role} data: {none} has a box round a single thing: {all_crowds} (iscrowd), which are neither learnt nor scored. "
            "Set iscrowd to 0 where it is one thing."
        )
    if stray := [where for part in found.values() for where in part.stray]:
        listed_stray = ", ".join(stray[:MAX_ORIGINS]) + (", …" if len(stray) > MAX_ORIGINS else "")
        said += f" {_stray(found)}: {listed_stray}."
    return DataError(said + (f" Boxes that were left out:{listed(faults)}" if faults else ""))


def _stray(found: Mapping[str, Found]) -> str:
    count = sum(number for part in found.values() for number in part.stray.values())
    return f"{counted(count, 'annotation')} of pictures that the file doesn't list, left out"


def notes(
    found: Mapping[str, Found], faults: Sequence[RowError], splits: Mapping[str, Sequence[DetectionRow]]
) -> dict[str, list[str]]:
    """What the user should look at, to the files it is about. `faults`: one a box."""
    counts = Counter(fault.reason for fault in faults)
    said: dict[str, list[str]] = {}
    for why, count in counts.most_common():
        left = "" if why.endswith("cut off") else ", left out"
        places = [fault.origin for fault in faults if fault.reason == why]
        said[f"{counted(count, 'box', 'boxes')} {why}{left}"] = list(dict.fromkeys(places))
    if stray := [where for part in found.values() for where in part.stray]:
        said[_stray(found)] = stray
    for part in splits.values():
        given = Counter(row.image_id for row in part)
        if twice := [row.origin for row in part if given[row.image_id] > 1]:
            said.setdefault("with an image_id that another picture has too", []).extend(twice)
    if thin := [row.origin for part in splits.values() for row in part if min(row.width, row.height) == 1]:
        said["only one pixel wide or high"] = thin
    return said


def facts(rows: Sequence[DetectionRow], labels: Sequence[str], *, trained: bool) -> list[str]:
    """Sentences on what there is to find. `trained`: the rows are to be learnt from."""
    counts = Counter(box.label for row in rows for box in row.boxes)
    if not counts:
        return []
    shown = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(8))
    where, kind = (" in training", "training ") if trained else ("", "")
    said = [
        f"{counted(len(labels), 'category', 'categories')}, "
        f"{counted(sum(counts.values()), 'box', 'boxes')}{where}: {shown}{', …' if len(counts) > 8 else ''}"
    ]
    if empty := sum(not row.boxes for row in rows):
        said.append(f"{counted(empty, f'{kind}picture')} without a box{': they teach what is nothing' if trained else ''}")
    if absent := [label for label in labels if label not in counts]:
        said.append(
            f"{counted(len(absent), 'category', 'categories')} without a {kind}box: "
            f"{', '.join(absent[:8])}{', …' if len(absent) > 8 else ''}"
        )
    return said
