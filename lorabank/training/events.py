"""What a run tells the outside, as values. The trainer emits them; console, metrics file and trackers listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lorabank.formats.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """One adapter's part of a run, known before the first step."""

    name: str
    rank: int
    parameters: int
    layers: int
    total_steps: int
    learning_rate: float
    learning_rate_reason: str
    train_rows: int
    val_rows: int
    packed_rows: tuple[int, float] | None = None
    """What the training rows are packed into in the first pass over them: how many rows, and the share of them that is filled."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The run, known before the first step."""

    model: str
    output: str
    device: str
    base_dtype: str
    base_parameters: int
    adapters: Sequence[AdapterPlan]
    resumed_from: str | None = None
    task: str = "text-generation"
    unit: str = "tokens"
    """What `tokens_per_second` counts."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of one adapter."""

    adapter: str
    step: int
    """1-based count of this adapter's optimizer steps."""
    total_steps: int
    pass_index: int
    """1-based count of forward passes of the whole run."""
    epoch: float
    loss: float
    """Mean of this step's loss: of tokens, negative log-likelihood in nats a token; else as the task has it, a row."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Trained tokens of this step; of other tasks what the loss is a mean over."""
    tokens_seen: int
    """Trained tokens of this adapter so far."""
    tokens_per_second: float
    """All tokens of this adapter (prompts included, padding not) a second of the joint run; of other tasks `RunPlan.unit`."""
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation of one adapter (or of the base, as `base`, or as `base (NAME's rows)` where rows differ)."""

    adapter: str
    step: int
    pass_index: int
    metrics: Mapping[str, float]
    """`loss` and whatever else was asked for, on held-out rows."""
    best: bool
    """Whether this is the adapter's best so far, by `eval.best`."""
    turned: bool = False
    """Whether validation loss has been rising: a sign of overfitting."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A sentence for the user: a warning, a stop, a choice made for them."""

    text: str
    adapter: str | None = None
    level: str = "info"
    """`info` or `warning`."""
    pass_index: int | None = None
    """Forward passes done when it was said; None before the first."""


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """How one adapter ended."""

    name: str
    folder: str
    steps: int
    status: str
    """`finished`, `stopped early`, `stopped: not finite`, `interrupted`, `not trained (dry run)`."""
    best_step: int | None
    best_metrics: Mapping[str, float]
    final_metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    output: str
    seconds: float
    adapters: Mapping[str, AdapterResult]
    base_metrics: Mapping[str, float] = field(default_factory=dict)
    """The base's scores on the held-out rows; empty where adapters have different ones (see `base_metrics_of`)."""
    base_metrics_of: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Adapter to the base's scores on that adapter's held-out rows."""
    interrupted: bool = False
    resume_command: str | None = None
    """What goes on with an interrupted run: a line for the shell, or the call of `lorabank.train`."""
    next_lines: Sequence[tuple[str, Sequence[str]]] = ()
    """(title, commands) that follow on a finished run."""
    trained: Mapping[str, Adapter] = field(default_factory=dict, repr=False, compare=False)
    """Name to the adapter as a value on the CPU: its best step, as in the run folder; interrupted, its present step."""


class Listener(Protocol):
    """Receives a run's events in order. Every method may be left empty."""

    def on_start(self, plan: RunPlan) -> None: ...
    def on_step(self, record: StepRecord) -> None: ...
    def on_eval(self, record: EvalRecord) -> None: ...
    def on_notice(self, notice: Notice) -> None: ...
    def on_busy(self, activity: str, done: int, total: int) -> None:
        """Progress inside something that takes long between steps, such as an evaluation. `done == total` ends it."""
        ...

    def on_end(self, result: RunResult) -> None: ...
