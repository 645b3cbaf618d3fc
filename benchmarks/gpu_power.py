"""Clock and power of a GPU while something runs, by nvidia-smi: whether a step is held back by the card's power limit."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FIELDS = "clocks.sm,power.draw,clocks_event_reasons.active"
EVERY_MS = 50
POWER_CAP, HOTTER = 0x4, 0x8 | 0x20 | 0x40
"""Bits of the reasons for lower clocks: the power limit; hardware slowdown, heat."""


@dataclass
class Watch:
    """`with Watch() as seen: ...; seen.row` has the medians, {} where nvidia-smi can't tell."""

    row: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        if shutil.which("nvidia-smi"):
            line = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", "-i", "0", "-lms", str(EVERY_MS)]
            self._process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self.row = summary(self._process.communicate()[0].splitlines())


def summary(lines: Iterable[str]) -> dict[str, Any]:
    """Medians of nvidia-smi's lines, and the share of them in which the clock was held back by power or by heat."""
    found: list[tuple[float, float, int]] = []
    for line in lines:
        try:
            clock, power, why = line.split(",")
            found.append((float(clock), float(power), int(why, 16)))
        except ValueError:
            continue  # a field that this card doesn't have, or half a line
    if not found:
        return {}
    clocks, watts, reasons = zip(*found, strict=True)
    return {
        "sm_mhz": statistics.median(clocks),
        "power_w": round(statistics.median(watts)),
        "power_capped": round(sum(bool(why & POWER_CAP) for why in reasons) / len(reasons), 2),
        "held_back_by_heat": round(sum(bool(why & HOTTER) for why in reasons) / len(reasons), 2),
    }
