"""`Walk`: the files below a folder. Links to folders are followed, but each real folder is walked once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from lorabank.data.listing import hidden, is_folder, listed


class Walk:
    """Of one folder. A link is passed over that leads to what is walked without it, was walked, or holds the folder itself."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._walked = {self._root, *self._root.parents}

    def enters(self, folder: Path) -> bool:
        """Whether a folder is to be walked; asked once of each."""
        real = folder.resolve()
        if real in self._walked or (folder.is_symlink() and real in self._without_links):
            return False
        self._walked.add(real)
        return True

    def files(self, folder: Path) -> Iterator[Path]:
        """Every file in a folder and in those below it. Raises DataError for a folder that may not be read."""
        for entry in shown(folder):
            if not is_folder(entry):
                yield entry
            elif self.enters(entry):
                yield from self.files(entry)

    @cached_property
    def _without_links(self) -> frozenset[Path]:
        """Folders below the root that no link is needed to reach: they are walked as what they are, before any link to them."""
        found: set[Path] = set()
        for above, folders, _ in os.walk(self._root):
            folders[:] = [name for name in folders if not hidden(Path(name))]
            found |= {Path(above, name) for name in folders if not Path(above, name).is_symlink()}
        return frozenset(found)


def shown(folder: Path) -> list[Path]:
    """What isn't hidden in a folder, in natural order. Raises DataError for a folder that may not be read."""
    return sorted((entry for entry in listed(folder) if not hidden(entry)), key=lambda entry: natural(entry.name))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key to sort names by: numbers in them by size, `class 2` before `class 10`."""
    return [(0, int(part)) if part.isdigit() else (1, part.lower()) for part in re.split(r"(\d+)", name) if part]
