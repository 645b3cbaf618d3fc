"""What a run knows of each adapter between passes: plain numbers, written into every checkpoint as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

RUNNING = "running"
FINISHED = "finished"
STOPPED_EARLY = "stopped early"
NOT_FINITE = "stopped: not finite"
INTERRUPTED = "interrupted"


@dataclass(kw_only=True)
class AdapterProgress:
    """One adapter."""

    step: int = 0
    """Optimizer steps made."""
    skipped: int = 0
    """Steps that weren't made because their gradient overflowed fp16."""
    position: int = 0
    """Micro-batches taken."""
    pending: int = 0
    """Micro-batches since the last optimizer step."""
    pending_loss: float = 0.0
    pending_tokens: float = 0.0
    """Token weights since the last optimizer step."""
    tokens_seen: float = 0.0
    status: str = RUNNING
    best_loss: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    without_gain: int = 0
    """Evaluations since the best."""
    turned: bool = False
    """Whether it was said that validation loss has turned since the best."""
    row_losses: dict[str, float] = field(default_factory=dict)
    """Row index (as text) to its last mean loss a token."""


@dataclass(kw_only=True)
class RunProgress:
    """The whole run."""

    pass_index: int = 0
    base_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """`base`, or `base (NAME's rows)` where adapters have different held-out rows, to its scores there."""
    seconds: float = 0.0
    """Wall-clock seconds of training so far, over all resumptions."""
    adapters: dict[str, AdapterProgress] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunProgress:
        """Back from `to_dict`."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name != "adapters"}
        return cls(**own, adapters={name: AdapterProgress(**part) for name, part in values["adapters"].items()})
