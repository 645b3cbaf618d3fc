"""The host's memory for what waits there: how much is left, and pieces of it that serve one pass after the other.

The kernel gives out pages that it doesn't have and kills what uses them. So whoever pins much must ask first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

KEPT_FREE = 2**30
"""Bytes that are left to the rest of the process and machine."""
ALIGNED = 512
"""What is given out begins at a multiple of so many bytes."""
SMALLEST, USUAL = 2**20, 2**28
"""Bytes of the first pieces, and of most where there are many. Powers of two, since torch pins those."""
WANTED = "of the host's memory are wanted"
"""What an error of this module says, whatever its numbers."""
_ROOT = Path("/")


@dataclass(frozen=True)
class _Groups:
    """A kind of Linux's control groups."""

    controller: str
    """Its name in /proc/self/cgroup."""
    folder: str
    limit: str
    used: str
    droppable: tuple[str, str]
    """Of what is used, in memory.stat: what the kernel gives to others first."""


_SECOND = _Groups("", "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))
_FIRST = _Groups(
    "memory",
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


class HostMemory:
    """Pieces of memory, given out from the first again in each pass: passes of any shape share them."""

    def __init__(self, pieces: Iterable[Tensor] = (), *, pinned: bool = False, grows: bool = True) -> None:
        """`pieces`: uint8, each (bytes,). `grows`: whether more may be taken."""
        self._pieces, self._pinned, self._grows = list(pieces), pinned, grows
        self._which = self._at = 0
        self.sizes: list[int] = []
        """Of what was given out since `restart`, in order."""

    @property
    def nbytes(self) -> int:
        """Of all pieces."""
        return sum(piece.numel() for piece in self._pieces)

    def restart(self) -> None:
        """Begin from the first piece: what was given out may be written over."""
        self._which = self._at = 0
        self.sizes = []

    def take(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,). Raises torch.OutOfMemoryError where the host doesn't have them; nothing is lost then."""
        self.sizes.append(nbytes)
        while True:
            place = next(_places(self._pieces, [nbytes], self._which, self._at), None)
            if place is not None:
                self._which, at = place
                self._at = at + _aligned(nbytes)
                return self._pieces[self._which][at : at + nbytes]
            self._grow(nbytes)

    def make_room(self, sizes: Sequence[int], share: float) -> None:
        """Have pieces for all of the sizes, from the first on.

        Raises torch.OutOfMemoryError where that is more than `share` of these pieces and of what the host has left.
        """
        check(sum(map(_aligned, sizes)), share, owned=self.nbytes)
        while len(found := list(_places(self._pieces, sizes))) < len(sizes):
            self._grow(sizes[len(found)])

    def split_off(self, sizes: Sequence[int]) -> list[Tensor]:
        """The first pieces, as many as the sizes need; they are others' from now on. Before anything is given out."""
        last = max((which for which, _ in _places(self._pieces, sizes)), default=-1)
        gone, self._pieces = self._pieces[: last + 1], self._pieces[last + 1 :]
        return gone

    def add(self, pieces: Iterable[Tensor]) -> None:
        """Take pieces (back)."""
        self._pieces += pieces

    def _grow(self, nbytes: int) -> None:
        if not self._grows:
            raise torch.OutOfMemoryError(f"{_gib(nbytes)} {WANTED} that weren't set aside: the passes before kept less")
        least = 1 << (nbytes - 1).bit_length()
        part = 1 << (self.nbytes // 4).bit_length() >> 1  # of what is there already
        size = max(2 * least, min(USUAL, max(SMALLEST, part)))  # a few fit into one, or up to half would be left over
        try:
            check(size)
        except torch.OutOfMemoryError:
            check(least)
            size = least
        self._pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))


def check(nbytes: int, share: float = 1.0, *, owned: int = 0) -> None:
    """See to it that so many bytes can be had, in `share` of what is left and of the `owned` bytes.

    Raises torch.OutOfMemoryError where they can't, before the kernel finds out.
    """
    found = available()
    if found is None:
        return
    left = max(0, found - KEPT_FREE) + owned
    if nbytes > left * share:
        of = "of" if share == 1.0 else f"of {share:.0%} of"
        raise torch.OutOfMemoryError(
            f"{_gib(nbytes)} {WANTED} for what waits there, {of} {_gib(left)} left ({_gib(KEPT_FREE)} stay free)"
        )


def available(root: Path = _ROOT) -> int | None:
    """Bytes that the machine, or the container's limit, still gives without taking them from others; None: nobody says.

    `root`: where the system's files are.
    """
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    found = [_of_machine(root)]
    for kind in (_SECOND, _FIRST):
        inside = [path for _, controllers, path in groups if kind.controller in controllers.split(",")]
        for path in {parent for own in ["/", *inside] for parent in (Path(own), *Path(own).parents)}:
            found.append(_of_group(root / kind.folder / str(path).lstrip("/"), kind))
    return min((value for value in found if value is not None), default=None)


def _of_machine(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_group(here: Path, kind: _Groups) -> int | None:
    limits, uses = _read(here / kind.limit).strip(), _read(here / kind.used).strip()
    if not (limits.isdecimal() and uses.isdecimal()):  # "max": no limit
        return None
    stats = dict(line.split(maxsplit=1) for line in _read(here / "memory.stat").splitlines() if " " in line)
    return max(0, int(limits) - int(uses) + sum(int(stats.get(name, 0)) for name in kind.droppable))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _places(pieces: Sequence[Tensor], sizes: Iterable[int], which: int = 0, at: int = 0) -> Iterator[tuple[int, int]]:
    """(piece, first byte in it) for each size, in order, as long as there is room."""
    for size in sizes:
        while which < len(pieces) and at + size > pieces[which].numel():
            which, at = which + 1, 0
        if which == len(pieces):
            return
        yield which, at
        at += _aligned(size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 or not nbytes else f"{nbytes / 2**20:.2f} MiB"
