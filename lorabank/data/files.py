"""Readers of data files, by suffix: each yields `Row`s that know their line. Formats of rows are another file's concern."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from lorabank.data.class_names import class_names_noted
from lorabank.data.row import Row
from lorabank.errors import DataError, MissingExtraError

# Longest mark first: UTF-32's little-endian mark begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """A file's text: UTF-8, or what its byte order mark says. Raises DataError with the line of the first bad byte."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        bad = raw[error.start : error.start + 1].hex()
        raise DataError(
            f"{path}:{line}: expected {encoding} text, got the byte 0x{bad}, which is none. "
            f"Convert the file first, such as: iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}"
        ) from error


def _object(value: object, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{origin}: expected an object with named columns, such as {{"text": …}}, got {type(value).__name__}')
    return Row(value, origin)


def _invalid_json(origin: str, error: json.JSONDecodeError | RecursionError) -> DataError:
    what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return DataError(f"{origin}: invalid JSON: {what}. Correct or delete that line.")


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold as is.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _invalid_json(origin, error) from error
        yield _object(value, origin)


def _read_json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    start = len(text) - len(text.lstrip())
    if not text[start:]:
        return
    if text[start] == "[":
        yield from _json_items(path, text, start)
        return
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        yield from _read_jsonl(path)  # JSON lines under the name .json are common
        return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        for number, item in enumerate(value["data"], start=1):
            yield _object(item, f"row {number} of {path}")
        return
    yield _object(value, f"{path}:1")


def _json_items(path: Path, text: str, start: int) -> Iterator[Row]:
    """Items of a top-level list, one at a time, so that each knows the line it begins on."""
    decoder = json.JSONDecoder()

    def skip(index: int) -> int:
        while index < len(text) and text[index] in " \t\r\n":
            index += 1
        return index

    position, line, counted = skip(start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: invalid JSON: {error.msg} at character {error.colno}.") from error
        except RecursionError as error:
            raise _invalid_json(origin, error) from error
        yield _object(value, origin)
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            here = f"{path}:{text.count(chr(10), 0, position) + 1}"
            raise DataError(f"{here}: invalid JSON: expected ',' or ']' after an item of the list. Is the file cut off?")
    if text[position + 1 :].strip():
        raise DataError(f"{path}:{text.count(chr(10), 0, position) + 1}: invalid JSON: more text after the end of the list")


def _read_csv(path: Path) -> Iterator[Row]:
    text = read_text(path)
    first_line = text.lstrip("\r\n").split("\n", 1)[0]
    # A header with no comma but another usual separator tells which one the file uses.
    delimiter = "," if "," in first_line else next((mark for mark in "\t;|" if mark in first_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # a record may span lines: name the one it begins on
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "Is a quote left open, or not doubled inside a field?"
            raise DataError(f"{path}:{line}: malformed CSV: {error}. {hint} JSON lines or Parquet hold any text.") from error
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = {name for name in header if header.count(name) > 1}
            if twice:
                raise DataError(f"{path}:{line}: the header names {', '.join(map(repr, sorted(twice)))} more than once")
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{line}: expected {len(header)} fields as in the header ({', '.join(header)}), got {len(fields)}. "
                "Is a field with a comma not quoted?"
            )
        yield Row(dict(zip(header, fields, strict=True)), f"{path}:{line}")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, classes = 0, class_names_noted(file.schema_arrow.metadata)
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"row {number} of {path}", classes)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix to reader. A reader takes a path and yields rows with their origin; it raises DataError that names file and line."""
