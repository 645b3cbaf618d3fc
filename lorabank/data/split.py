"""Deterministic splits: which rows are held out depends on their content and the seed, not on their order or the process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabank.errors import DataError, closest
from lorabank.wording import counted


@dataclass(frozen=True)
class Split:
    """Positions of the rows in each part, each in ascending order."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def split_rows(keys: Sequence[str], *, val: float | int, test: float | int, seed: int, unit: str = "rows") -> Split:
    """Split rows so that equal keys never land in two parts.

    `val` and `test` are shares (below 1) or numbers of rows (1 and above); 0 for none. Keys are taken in the order of their
    hash with the seed, so that a row's place doesn't change with the order of the file, and hardly when rows are added.
    Whole groups of equal keys are moved, so a part may come out a little smaller than asked. Raises DataError where a part,
    or the training rows, would be empty. `unit` names what a key is, for messages.
    """
    members: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(key, []).append(position)
    order = sorted(members, key=lambda key: (_rank(key, seed), key))
    wanted = {"val": _count(val, len(keys)), "test": _count(test, len(keys))}
    parts = sum(1 for count in wanted.values() if count)
    if sum(wanted.values()) >= len(keys) and parts:
        raise DataError(
            f"data.val_split {val} and data.test_split {test} ask for {sum(wanted.values())} of {counted(len(keys), 'row')}, "
            "which leaves none to train on. Lower them, or set them to 0"
        )
    if len(order) < parts + 1:
        raise DataError(
            f"{counted(len(keys), 'row')}, different {unit}: {len(order)}, too few to hold some out and train on the rest. "
            "Give data.val its own file, or set data.val_split and data.test_split to 0"
        )
    taken: dict[str, str] = {}
    for part in ("test", "val"):
        # Each part still to come, and training, needs at least one group.
        reserve = 1 + (1 if part == "test" and wanted["val"] else 0)
        _take(part, wanted[part], order, members, taken, reserve)
    places: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for key, positions in members.items():
        places[taken.get(key, "train")].extend(positions)
    return Split(*(tuple(sorted(places[part])) for part in ("train", "val", "test")))


def group_of(values: Mapping[str, Any], column: str | None, origin: str) -> str | None:
    """A row's value of the column `data.group_by`; None where none is set. Raises DataError for a row without it."""
    if column is None:
        return None
    if column not in values:
        raise DataError(
            f"{origin}: data.group_by asks for column {column!r}{closest(column, values)}; there are "
            f"{', '.join(values) or 'none'}"
        )
    return str(values[column])


def group_unit(column: str | None, unit: str) -> str:
    """What a key is, for messages of `split_rows`."""
    return unit if column is None else f"values of {column!r}"


def _rank(key: str, seed: int) -> bytes:
    salt = (seed % 2**64).to_bytes(8, "little")
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, salt=salt).digest()


def _count(wanted: float | int, rows: int) -> int:
    """Rows of a part; a share of anything above zero is at least one row."""
    if wanted <= 0:
        return 0
    return max(1, round(wanted * rows)) if wanted < 1 else int(wanted)


def _take(
    part: str, wanted: int, order: Sequence[str], members: dict[str, list[int]], taken: dict[str, str], reserve: int
) -> None:
    free = [key for key in order if key not in taken]
    budget, total = len(free) - reserve, 0
    for key in free:
        if budget and total + len(members[key]) <= wanted:
            taken[key] = part
            total += len(members[key])
            budget -= 1
    if wanted and not total:  # every group is larger than the part: the smallest comes closest
        taken[min(free, key=lambda key: len(members[key]))] = part
