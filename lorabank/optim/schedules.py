"""Learning-rate schedules: the factor on the peak rate at each optimizer step. One table: `SCHEDULES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lorabank.config.checks import check_choice

Schedule = Callable[[float], float]
"""Progress after warm-up, in [0, 1] → factor in [0, 1]."""

SCHEDULES: Mapping[str, Schedule] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor for optimizer step `step` (0-based) of `total_steps`.

    Warm-up rises linearly over its steps, 1/(w+1) … w/(w+1), so that no step is wasted at zero; the peak is the step after it.
    The schedule then falls to zero at step `total_steps`, the one after the last.
    """
    check_choice("lr_scheduler", schedule, SCHEDULES)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(progress, 1.0))
