"""Samples that are given as numbers: an array or list and its rate → float32 at full scale ±1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lorabank.data.row import RowError

WIDTHS = (16, 24, 32, 64)
"""Bits that whole numbers are samples of: the fewest that hold them, since 16 bits often come in a list or an int64."""


def given(array: Any, rate: object) -> tuple[np.ndarray, int]:
    """(float32 samples (S,) or (S, C), samples a second) of an `array` and its `sampling_rate`. Raises RowError."""
    hz = _whole(rate)
    try:
        samples = np.asarray(array)
    except ValueError as error:  # rows of unequal lengths
        raise RowError("the samples are no array: channels of different lengths") from error
    if samples.dtype.kind in "iu":
        samples = _scaled(samples)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2):
        raise RowError(f"samples are numbers, one or two dimensions; got {samples.dtype} of shape {samples.shape}")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # channels first, as torch has them
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused by its name
        return samples.astype(np.float32), hz


def _whole(rate: object) -> int:
    number = rate.item() if isinstance(rate, np.number) else rate
    if isinstance(number, float) and math.isfinite(number) and number == int(number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise RowError(f"samples need a whole sampling_rate, got {rate!r}")
    return number


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Whole numbers as float64 between −1 and 1, by the bits that they need, whatever type holds them."""
    if samples.dtype == np.uint8:  # 8 bits of WAV have their silence at 128
        return (samples.astype(np.float64) - 128) / 128
    if samples.dtype == np.int8:
        return samples / 128.0
    wide = samples.astype(np.float64)
    peak = float(np.abs(wide).max()) if wide.size else 0.0
    bits = next((bits for bits in WIDTHS if peak <= 2.0 ** (bits - 1)), WIDTHS[-1])
    return wide / 2.0 ** (bits - 1)
