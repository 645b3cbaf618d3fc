"""What a denoiser is trained to predict, and with which weight: numbers a row, computed on the host.

With clean latents x and noise ε, a model sees a·x + b·ε and is asked for c·x + d·ε. So one pass serves every kind of schedule:

| kind | a, b | c, d |
|---|---|---|
| `epsilon` (DDPM, arXiv:2006.11239) | √ᾱ, √(1 − ᾱ) | 0, 1 |
| `v_prediction` (arXiv:2202.00512) | √ᾱ, √(1 − ᾱ) | −√(1 − ᾱ), √ᾱ |
| `sample` | √ᾱ, √(1 − ᾱ) | 1, 0 |
| `flow` (arXiv:2403.03206, eq. 13) | 1 − σ, σ | −1, 1 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabank.errors import ConfigError, ModelError
from lorabank.tasks.diffusion.draws import RowDraw

KINDS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True, kw_only=True)
class RowNumbers:
    """One row's place on the schedule."""

    time: float
    """What the model is told."""
    signal: float
    """a: how much of the clean latents it sees."""
    noise: float
    """b: how much of the noise."""
    target_signal: float
    """c."""
    target_noise: float
    """d."""
    weight: float
    """What its loss counts."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A noise schedule and what is predicted on it."""

    kind: str
    steps: int
    """Training timesteps."""
    signal: tuple[float, ...] = ()
    """ᾱ of each timestep; none for `flow`."""
    shift: float = 1.0
    """Of `flow`: σ = shift·u / (1 + (shift − 1)·u)."""
    min_snr: float | None = None
    """γ of min-SNR weighting (arXiv:2303.09556); None: every row counts 1."""

    def __post_init__(self) -> None:
        if self.min_snr is not None and self.kind == "flow":
            raise ConfigError(
                "min_snr: it weighs the timesteps of a diffusion, and this model is a flow, whose places are drawn from a "
                "logit-normal distribution instead. Leave min_snr out."
            )

    def numbers(self, draw: RowDraw) -> RowNumbers:
        """Where a row is trained."""
        return self.at_sigma(draw) if self.kind == "flow" else self.at(min(int(draw.place * self.steps), self.steps - 1))

    def at(self, step: int) -> RowNumbers:
        """Of a timestep, for all kinds but `flow`."""
        kept = self.signal[step]
        a, b = math.sqrt(kept), math.sqrt(1.0 - kept)
        c, d = {"epsilon": (0.0, 1.0), "v_prediction": (-b, a), "sample": (1.0, 0.0)}[self.kind]
        weight = 1.0 if self.min_snr is None else snr_weight(kept, self.kind, self.min_snr)
        return RowNumbers(time=float(step), signal=a, noise=b, target_signal=c, target_noise=d, weight=weight)

    def at_sigma(self, draw: RowDraw) -> RowNumbers:
        """Of a flow: u = sigmoid(n), n standard normal (arXiv:2403.03206, eq. 19 with m = 0, s = 1), then shifted."""
        u = 1.0 / (1.0 + math.exp(-draw.normal))
        sigma = self.shift * u / (1.0 + (self.shift - 1.0) * u)
        return RowNumbers(
            time=sigma * self.steps, signal=1.0 - sigma, noise=sigma, target_signal=-1.0, target_noise=1.0, weight=1.0
        )


def snr_weight(kept: float, kind: str, gamma: float) -> float:
    """Min-SNR's weight of a timestep with ᾱ = `kept` (arXiv:2303.09556, section 3.4), SNR = ᾱ / (1 − ᾱ).

    min(SNR, γ) where the sample is predicted, / SNR for ε, / (SNR + 1) for v.
    """
    if kept >= 1.0:  # SNR is infinite
        return gamma if kind == "sample" else 0.0
    snr = kept / (1.0 - kept)
    if kind == "epsilon":
        return min(1.0, gamma / snr) if snr else 1.0
    return min(snr, gamma) / (1.0 if kind == "sample" else snr + 1.0)


def objective_of(scheduler: Any, *, min_snr: float | None = None, kind: str | None = None) -> Objective:
    """The objective that a pipeline's scheduler was trained with. `kind`: what it predicts, where its configuration is wrong.

    Raises ModelError for a scheduler that says neither ᾱ nor σ.
    """
    config: Mapping[str, Any] = scheduler.config
    steps = int(config.get("num_train_timesteps", 1000))
    if "FlowMatch" in type(scheduler).__name__:
        if kind not in (None, "flow"):
            raise ConfigError(f"prediction: this model is a flow, which predicts noise − sample, got {kind!r}. Leave it out.")
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift") or 1.0)  # by size, in sampling alone
        return Objective(kind="flow", steps=steps, shift=shift, min_snr=min_snr)
    kept = getattr(scheduler, "alphas_cumprod", None)
    predicts = kind or str(config.get("prediction_type", "epsilon"))
    if not isinstance(kept, Tensor) or predicts not in KINDS[:3]:
        raise ModelError(
            f"scheduler {type(scheduler).__name__} (predicts {predicts!r}): training needs a schedule of ᾱ with one of "
            f"{', '.join(KINDS[:3])}, or a flow. Put another scheduler_config.json into the model's folder."
        )
    return Objective(kind=predicts, steps=steps, signal=tuple(kept.double().tolist()), min_snr=min_snr)


def row_tensors(rows: Sequence[RowNumbers]) -> dict[str, Tensor]:
    """What a pass reads of its rows' numbers, fp32 (N,) each."""
    names = ("time", "signal", "noise_part", "target_signal", "target_noise", "weight")
    values = [[row.time, row.signal, row.noise, row.target_signal, row.target_noise, row.weight] for row in rows]
    columns = torch.tensor(values, dtype=torch.float32).unbind(1)
    return {name: column.contiguous() for name, column in zip(names, columns, strict=True)}


def noisy(batch: Mapping[str, Tensor]) -> Tensor:
    """a·x + b·ε, fp32, of a batch's `clean` and `noise` (N, C, H, W)."""
    return _wide(batch["signal"]) * batch["clean"] + _wide(batch["noise_part"]) * batch["noise"]


def row_losses(batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
    """Each row's mean squared error times its weight, fp32 (N,)."""
    target = _wide(batch["target_signal"]) * batch["clean"] + _wide(batch["target_noise"]) * batch["noise"]
    return batch["weight"] * (predicted.float() - target).square().flatten(1).mean(1)


def _wide(numbers_N: Tensor) -> Tensor:
    return numbers_N.view(-1, 1, 1, 1)
