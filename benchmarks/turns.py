"""Two systems in turns: each lives in a process of its own, and only one of them works at a time.

A process of its own gives each system its own memory, as its users have it. Turns of a few seconds and ratios taken turn by turn
are what a machine that drifts allows. `serve` is the worker's side (or `Turn`, for a loop that is another library's), `Worker`
and `ratios` the other.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

READY = "ready"
PEAK = "peak"
"""Asks a worker for its device's memory."""
WARM_UP = 2
"""Steps before the first measured one."""


class Turn:
    """A worker's turns, told of each step that was made: it waits where no more are wanted for now."""

    def __init__(self, wait: Callable[[], None] = lambda: None, peak: Callable[[], float] = lambda: 0.0) -> None:
        """`wait`: until the device has done what it was given. `peak`: GiB of the device's memory, when the other side asks."""
        self._wait, self._peak = wait, peak
        self._left, self._began = WARM_UP, 0.0

    def step_done(self) -> bool:
        """After each step; False when no more will be wanted. Says `ready` after the first few, then how long each turn took."""
        self._left -= 1
        if self._left:
            return True
        self._wait()
        print(time.perf_counter() - self._began if self._began else READY, flush=True)
        for line in sys.stdin:
            if line.strip() == PEAK:
                print(self._peak(), flush=True)
                continue
            self._left, self._began = int(line), time.perf_counter()
            return True
        return False


def serve(step: Callable[[], None], turn: Turn | None = None) -> None:
    """Warm up, say so, then make as many steps as each line of standard input asks for and print the seconds they took."""
    turn = turn or Turn()
    step()
    while turn.step_done():
        step()


class Worker:
    """A process that makes steps when told to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self._answer()) != READY:
            print(line)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended early: {self._process.args!r}")
        return line.strip()

    def steps(self, count: int) -> float:
        """Seconds that `count` steps took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def device_peak_gib(self) -> float:
        """What the worker says of its device's memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{PEAK}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def peak_gib(self) -> float:
        """The largest resident set so far, GiB (VmHWM: getrusage would count the parent's before the fork)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20

    def end(self) -> None:
        """Let it finish."""
        self._process.communicate()


@dataclass(frozen=True)
class Ratios:
    """What the turns gave."""

    mine_s: list[float]
    """One step of ours, each turn."""
    other_s: list[float]
    """`repeats` steps of the other."""

    @property
    def each(self) -> list[float]:
        """Ours over the other, turn by turn."""
        return [a / b for a, b in zip(self.mine_s, self.other_s, strict=True)]

    def record(self) -> dict[str, float]:
        """For the result file."""
        return {
            "ours_s": round(statistics.median(self.mine_s), 3),
            "other_s": round(statistics.median(self.other_s), 3),
            "ratio": round(statistics.median(self.each), 3),
            "ratio_of_sums": round(sum(self.mine_s) / sum(self.other_s), 3),
            "ratio_min": round(min(self.each), 3),
            "ratio_max": round(max(self.each), 3),
        }


def ratios(mine: Worker, other: Worker, *, repeats: int, rounds: int) -> Ratios:
    """A step of ours beside `repeats` of the other, `rounds` times; who goes first changes every round."""
    mine_s: list[float] = []
    other_s: list[float] = []
    for i in range(rounds):
        for system in (0, 1) if i % 2 == 0 else (1, 0):
            if system == 0:
                mine_s.append(mine.steps(1))
            else:
                other_s.append(other.steps(repeats))
    return Ratios(mine_s, other_s)
