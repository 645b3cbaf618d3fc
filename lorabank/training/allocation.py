"""Keeping freed memory inside the process, for long work on a CPU.

A training step frees and takes gigabytes of activations. glibc gives large blocks back to the system at once, so every step pays
for the same page faults again: about a twentieth of a step of SmolLM2-135M (benchmarks/LOG.md). The setting is the whole
process's, so only programs that are the process call this: the command line, the quickstart, the benchmark; never the library.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""
TOP_PAD = 64 * 2**20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """From now on this process reuses what it frees. Returns whether the C library is one that can be told so (glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, TOP_PAD)))
