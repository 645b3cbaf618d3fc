"""Ctrl-C in a run: the first one asks for a stop at the next safe place, the second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequested(Exception):  # noqa: N818 (a request, not an error)
    """Raised inside an evaluation that can be given up without loss."""


class InterruptFlag:
    """Whether Ctrl-C (or SIGTERM) came."""

    def __init__(self) -> None:
        self.set = False

    def check(self) -> None:
        """Raise StopRequested when it came."""
        if self.set:
            raise StopRequested


@contextlib.contextmanager
def interruptible() -> Iterator[InterruptFlag]:
    """Catch SIGINT and SIGTERM in a flag while inside; in another thread than the main one nothing is caught."""
    flag = InterruptFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.set:
            raise KeyboardInterrupt
        flag.set = True

    for s in previous:
        signal.signal(s, handle)
    try:
        yield flag
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
