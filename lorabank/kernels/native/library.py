"""The compiled library of this process and its functions' types."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

from lorabank.kernels.native.build import SWITCH, library_path


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The compiled functions of this process, or None where they can't be had."""
    path = library_path()
    return None if path is None else load_or_warn(path)


def load_or_warn(path: Path) -> ctypes.CDLL | None:
    """`load`, or a warning and None where it can't be loaded."""
    try:
        return load(path)
    except (OSError, AttributeError) as error:  # a folder whose files may not be executed, say; not our library
        warnings.warn(
            f"lorabank's C functions can't be loaded, so the slower plain ones serve: {error}. {SWITCH}=0 silences this.",
            stacklevel=2,
        )
        return None


def load(path: Path) -> ctypes.CDLL:
    """A compiled library with its functions' types. Raises OSError where it can't be loaded, AttributeError for another one."""
    functions = ctypes.CDLL(str(path))
    for function in (functions.lora_through, functions.lora_outer):
        function.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    for function in (functions.attention_forward, functions.attention_backward):
        function.argtypes = [ctypes.c_char_p, ctypes.c_int]
    functions.squares.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_int]
    functions.adamw.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_int]
    for function in (functions.lora_outer, functions.squares, functions.adamw):
        function.restype = None  # the others return whether memory ran out, an int
    return functions
