"""`AdapterConfig`: what one adapter is, as a frozen value. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorabank.config.checks import check_bool, check_fraction, check_positive, check_positive_int, freeze_sequences
from lorabank.config.extras import TokenIndices, check_extras, frozen_indices
from lorabank.config.inits import check_init
from lorabank.errors import ConfigError, Setting

Targets = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """One adapter: y = W x + scaling · B A x on every targeted layer (LoRA, arXiv:2106.09685, eq. 3)."""

    rank: int = 16
    """Rows of A and columns of B. Cost and memory follow it."""
    alpha: float = 32.0
    """Numerator of the scaling α/r (or α/√r with `use_rslora`)."""
    targets: Targets = "all-linear"
    """`all-linear`, `all-conv`, `all-embedding`, roles (q k v o attention cross-attention mlp), names, globs, or `re:…`."""
    exclude: Targets = ()
    """Same language as `targets`; what matches stays unadapted."""
    layers: Sequence[int] | None = None
    """Block indices to adapt; None means all blocks."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Module-name pattern (PEFT's: matches the end of the path, regular expressions allowed) to a rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Module-name pattern to an alpha."""
    dropout: float = 0.0
    """Probability that a channel of a LoRA layer's input is dropped in training; in [0, 1)."""
    init: str = "uniform"
    """How A starts: `uniform` in ±1/√in, or `gaussian` with σ = 1/rank; B starts at zero. `orthogonal`: both random, B A = 0.
    `pissa`, `pissa_niter_<n>`, `olora`: from the base weight, as a difference; `eva`: from data; `loftq`: from the weights before
    quantisation (docs/inits.md)."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA, arXiv:2402.09353)."""
    ensure_weight_tying: bool = False
    """An adapter on an embedding whose weight is another layer's too, such as the output head's, changes both ends alike."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full beside the adapter, by the ends of their paths; a classifier's head unasked, unless it is empty."""
    bias: str = "none"
    """Which biases of the model are trained: `none`, `lora_only` (those of adapted layers), or `all`."""
    lora_bias: bool = False
    """Give each lora_B a bias b of its own (PEFT's name): outputs change by scaling · (B A x + b)."""
    trainable_token_indices: TokenIndices = ()
    """Token ids whose rows of the input embedding are trained; or names of embeddings, each with its ids (PEFT's name)."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_positive_int("rank", self.rank, hint="a LoRA adapter needs at least rank 1")
        check_positive("alpha", self.alpha)
        check_fraction("dropout", self.dropout)
        for name in ("use_rslora", "use_dora", "ensure_weight_tying", "lora_bias"):
            check_bool(name, getattr(self, name))
        check_init(self.init, use_dora=self.use_dora)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(Setting(name), f": expected module names with numbers, got {getattr(self, name)!r}")
        for pattern, rank in self.rank_pattern.items():
            check_positive_int("rank_pattern", rank, part=f"[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            check_positive("alpha_pattern", alpha, part=f"[{pattern!r}]")
        for name in ("targets", "exclude"):
            _check_targets(name, getattr(self, name), may_be_empty=name == "exclude")
        blocks = self.layers
        listed = isinstance(blocks, Sequence) and not isinstance(blocks, str)
        if blocks is not None and not (listed and all(isinstance(i, int) and i >= 0 for i in blocks)):
            raise ConfigError(Setting("layers"), f": expected a list of block indices ≥ 0, got {blocks!r}")
        saved = self.modules_to_save
        if saved is not None and (isinstance(saved, str) or any(not isinstance(name, str) or not name for name in saved)):
            raise ConfigError(Setting("modules_to_save"), f": expected a list of module names, got {saved!r}")
        object.__setattr__(self, "trainable_token_indices", frozen_indices(self.trainable_token_indices))
        check_extras(self.bias, self.lora_bias, self.use_dora)

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor on B·A for one layer's rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _check_targets(name: str, value: object, *, may_be_empty: bool) -> None:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or any(not isinstance(item, str) or not item for item in items):
        raise ConfigError(Setting(name), f": expected a name or a list of names, got {value!r}")
    if not items and not may_be_empty:
        raise ConfigError(
            Setting(name), ": empty, so nothing would be adapted. Use 'all-linear', roles (q, v, mlp) or module names."
        )
