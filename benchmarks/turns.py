"""Two systems in turns: each lives in a process of its own, and only one of them works at a time.

A process of its own gives each system its own memory, as its users have it. Turns of a few seconds and ratios taken turn by turn
are what a machine that drifts allows. `serve` is the worker's side (or `Turn`, for a loop that is another library's), `Worker`
and `ratios` the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

READY = "ready"
PEAK = "peak"
"""Asks a worker for its device's memory."""
WARM_UP, GPU_WARM_UP = 2, 6
"""Steps before the first measured one; on a GPU ours are compiled in the first and captured as a graph in the third."""
GPU_STEPS = 10
"""Of ours in a turn on a GPU, where one takes milliseconds."""


class Turn:
    """A worker's turns, told of each step that was made: it waits where no more are wanted for now."""

    def __init__(self, device: str = "cpu") -> None:
        self._on_gpu = device.startswith("cuda")
        self._left, self._began = GPU_WARM_UP if self._on_gpu else WARM_UP, 0.0

    def _wait(self) -> None:
        """Until the device has done what it was given."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def _peak(self) -> float:
        """The most that tensors took of the device's memory so far, GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self._on_gpu else 0.0

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


def serve(step: Callable[[], None], device: str = "cpu") -> None:
    """Warm up, say so, then make as many steps as each line of standard input asks for and print the seconds they took."""
    turn = Turn(device)
    step()
    while turn.step_done():
        step()


class Worker:
    """A process that makes steps when told to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        """Its model is loaded, and the first steps are made."""
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
            "ours_s": round(statistics.median(self.mine_s), 5),
            "other_s": round(statistics.median(self.other_s), 5),
            "ratio": round(statistics.median(self.each), 3),
            "ratio_of_sums": round(sum(self.mine_s) / sum(self.other_s), 3),
            "ratio_min": round(min(self.each), 3),
            "ratio_max": round(max(self.each), 3),
        }


def ratios(mine: Worker, other: Worker, *, repeats: int, rounds: int, steps: int = 1) -> Ratios:
    """`steps` of ours beside `repeats` times as many of the other, `rounds` times; who goes first changes every round."""
    mine.wait_until_ready()
    other.wait_until_ready()
    mine_s: list[float] = []
    other_s: list[float] = []
    for i in range(rounds):
        for system in (0, 1) if i % 2 == 0 else (1, 0):
            if system == 0:
                mine_s.append(mine.steps(steps) / steps)
            else:
                other_s.append(other.steps(repeats * steps) / steps)
    return Ratios(mine_s, other_s)


def steps_of_a_turn(device: str) -> int:
    """How many of ours are timed together."""
    return GPU_STEPS if device.startswith("cuda") else 1


def peaks_gib(workers: Sequence[Worker], device: str) -> list[float]:
    """Of the GPU's memory, or of the process's on a CPU."""
    on_gpu = device.startswith("cuda")
    return [round(worker.device_peak_gib() if on_gpu else worker.peak_gib(), 2) for worker in workers]


def keep(record: Mapping[str, Any], path: Path | None) -> None:
    """Write what was measured so far: a run that is cut short keeps its lines."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
