"""`rows_of`: rows of an object, a list of dicts or one of the datasets library, whatever its format or transform."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorabank.data.class_names import class_names
from lorabank.data.repository import SPLITS
from lorabank.data.row import Row
from lorabank.errors import DataError, MissingExtraError, first_line

SPLIT_NAMES = {**SPLITS, "val": (*SPLITS["val"], "test")}
"""Part of a data set → splits of a DatasetDict that are it, the likeliest first; one to validate on may have a test alone."""


def import_datasets(wanted: str) -> Any:
    """The datasets library, needed for `wanted`. Raises MissingExtraError."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"data set {wanted!r}: needs the datasets library: pip install datasets. Files of rows need none."
        ) from error
    return datasets


def plain(source: Any) -> Any:
    """A data set of the datasets library without its format, whose values would be tensors or frames; anything else as it is.

    A transform stays: rows are what it makes of them.
    """
    datasets = sys.modules.get("datasets")  # an object of that library exists only where it has been imported
    if datasets is None:
        return source
    if isinstance(source, datasets.IterableDataset):
        return source.with_format(None)
    return source if not isinstance(source, datasets.Dataset) or transformed(source) else source.with_format(None)


def transformed(source: Any) -> bool:
    """Whether it is a data set whose rows a function makes (`with_transform`)."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset) and source.format["type"] == "custom"


def pick_split(source: Any, role: str, name: str | None) -> tuple[Any, str]:
    """(the split of a DatasetDict that a role means, its name). Raises DataError where several could be meant."""
    split = next((s for s in SPLIT_NAMES.get(role, ()) if s in source), None)
    if split is None and len(source) == 1:
        split = next(iter(source))
    if split is None:
        wanted = f"{name}:config:split" if name else "dataset['split']"
        raise DataError(f"{name or 'the data set'} has the splits {', '.join(map(str, source))}: say which with {wanted}")
    return source[split], f"{name}[{split}]" if name else f"split {split!r}"


def rows_of(source: Any, role: str, name: str | None = None) -> Iterator[Row]:
    """The rows of an object that is a data set's `role`. Raises DataError for what is none."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        source, name = pick_split(source, role, name)
    where = name or f"the {role} rows given"
    if isinstance(source, Mapping | str | bytes) or not isinstance(source, Iterable):
        raise DataError(f"{role} data: expected a path, a data set or a list of dicts, got {type(source).__name__}")
    classes = _class_names(source)
    rows = _made(source, where) if transformed(source) else plain(source)
    for number, values in enumerate(rows, start=1):
        origin = f"row {number} of {where}"
        if not isinstance(values, Mapping):
            raise DataError(f"{origin}: expected a dict of columns, got {type(values).__name__}")
        yield Row(values, origin, classes)


def _made(source: Any, where: str) -> Iterator[Any]:
    """What a data set's transform makes of each row. Raises DataError, with the row, where it fails."""
    for index in range(len(source)):
        try:
            yield source[index]
        except Exception as error:  # the function is the user's: it may raise anything
            raise DataError(
                f"row {index + 1} of {where}: the transform of the data set fails on it ({type(error).__name__}: "
                f"{first_line(error)}). Correct the function, or take it off: dataset.with_format(None)."
            ) from error


def _class_names(source: Any) -> dict[str, list[str]]:
    """The names that a data set of the datasets library has for the numbers of its columns."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(source, datasets.Dataset | datasets.IterableDataset) or not source.features:
        return {}
    return class_names(source.features.to_dict())
