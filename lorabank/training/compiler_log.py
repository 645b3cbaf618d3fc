"""What torch's compiler writes to the terminal by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

DYNAMO = "torch._dynamo"


@contextmanager
def without_recompilations(compiled: bool) -> Iterator[None]:
    """Keep the compiler's warnings off a run whose blocks are compiled: each new shape of batch is one, and no fault.

    A level that somebody set for that logger (or `TORCH_LOGS`) stays; ours goes with the run.
    """
    logger = logging.getLogger(DYNAMO)
    if not compiled or logger.level != logging.NOTSET:
        yield
        return
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)
