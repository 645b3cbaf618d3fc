"""Output folders: refused when they hold something, and complete or absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabank.config.paths import expanded
from lorabank.errors import AdapterFileError, OutputError
from lorabank.formats.scratch import scratch_beside


def chosen_path(source: str, place: str) -> Path:
    """The file or folder of an adapter: a path, or `folder:name` for one of several in a folder.

    Raises AdapterFileError for what can't be a path, or a name that the folder doesn't hold.
    """
    from lorabank.formats.choice import chosen

    return chosen(expanded(source, place=place, kind=AdapterFileError))


def refuse_existing(output: str, place: str = "--output") -> Path:
    """The folder, which is new or empty. Raises OutputError otherwise. `place`: what the command line calls it."""
    folder = expanded(output, place=place, kind=OutputError)
    if folder.name in ("", ".."):
        raise OutputError(f"{place}: {output!r} isn't the name of something new. Name what is to be made, such as out/new.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already and isn't empty. Choose another {place}.")
    if blocked := next((above for above in folder.parents if above.is_file()), None):
        raise OutputError(f"{folder}: {blocked} is a file, so nothing can be written in it. Choose another {place}.")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place at the end; nothing is left behind on an error."""
    from safetensors import SafetensorError

    with scratch_beside(folder) as scratch:
        try:
            made = scratch / folder.name
            made.mkdir()
            yield made
            if folder.is_dir():
                folder.rmdir()
            made.replace(folder)
        except OSError as error:
            raise OutputError(f"{folder}: can't be written: {error.strerror or error}") from error
        except SafetensorError as error:  # what its writers raise of a full disk
            raise OutputError(f"{folder}: can't be written: {error}") from error
