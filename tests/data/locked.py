"""`locked`: a folder as it is for one who may not read it, whoever runs the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def locked(folder: Path, mode: int = 0) -> Iterator[None]:
    """`folder`, a path relative to the working folder, with `mode`; root, who may read anything, is somebody else meanwhile."""
    own, here, root = folder.stat().st_mode, Path.cwd(), os.geteuid() == 0
    here.chmod(0o755)
    folder.chmod(mode)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(own)
