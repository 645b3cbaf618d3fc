"""What the host's memory still holds: pinned memory that isn't there ends a process without a word.

The kernel gives out pages that it doesn't have and kills what asked for them. So whoever pins much asks here first.
"""

from __future__ import annotations

from pathlib import Path

import torch

KEPT_FREE = 2**30
"""Bytes that are left to the rest of the process and machine."""
WANTED = "of the host's memory are wanted"
"""What an error of this module says, whatever its numbers."""
_ROOT = Path("/")
_GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of Linux's second and first kind of control groups, as a container sees its own: folder, limit, use, what can be dropped."""


def available(root: Path = _ROOT) -> int | None:
    """Bytes that the machine, or the container's limit, still gives without taking them from others; None: nobody says.

    `root`: where the system's files are.
    """
    found = [_of_machine(root), *(_of_group(root, *names) for names in _GROUPS)]
    return min((value for value in found if value is not None), default=None)


def pinned(nbytes: int) -> int:
    """Bytes that torch takes for a pinned tensor of so many: the next power of two."""
    return 1 << max(nbytes - 1, 0).bit_length()


def check_pinning(nbytes: int, share: float = 1.0) -> None:
    """See to it that so many bytes can be pinned, in `share` of what is available.

    Raises torch.OutOfMemoryError where they can't, before the kernel finds out.
    """
    left = available()
    if left is None:
        return
    stats = torch.cuda.host_memory_stats()
    left += int(stats.get("allocated_bytes.current", 0)) - int(stats.get("active_bytes.current", 0))  # torch keeps it for others
    left = max(0, left - KEPT_FREE)
    if nbytes > left * share:
        of = "" if share == 1.0 else f" {share:.0%} of"
        raise torch.OutOfMemoryError(
            f"{nbytes / 2**30:.2f} GiB {WANTED} for what waits there, of{of} {left / 2**30:.2f} GiB left"
        )


def _of_machine(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_group(root: Path, folder: str, limit: str, used: str, droppable: str) -> int | None:
    here = root / folder
    limits, uses = _read(here / limit).strip(), _read(here / used).strip()
    if not (limits.isdecimal() and uses.isdecimal()):  # "max": no limit
        return None
    stats = dict(line.split(maxsplit=1) for line in _read(here / "memory.stat").splitlines() if " " in line)
    return max(0, int(limits) - int(uses) + int(stats.get(droppable, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
