"""`AdapterStart`: where an untrained adapter begins, made from data or from other weights. `bank.add` takes it for a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorabank.bank.carrier import SlotValues
from lorabank.config.adapter import AdapterConfig
from lorabank.config.inits import PREPARED
from lorabank.errors import ConfigError, Setting, TargetError


@dataclass(frozen=True, kw_only=True)
class AdapterStart:
    """An `AdapterConfig` with the values that its adapter starts from, by module path as the model has it."""

    config: AdapterConfig
    A: Mapping[str, Tensor]
    """(rank, in), fp32, on the CPU."""
    B: Mapping[str, Tensor]
    """(out, rank); of a layer that isn't here it is zero."""

    def values(self, path: str, rank: int, features: tuple[int, int], scaling: float) -> SlotValues:
        """What a slot begins with at `path`, a layer of these (in, out). Raises TargetError where it was made for another."""
        A, B = self.A.get(path), self.B.get(path)
        made = None if A is None else (tuple(A.shape), None if B is None else tuple(B.shape))
        if A is None or A.shape != (rank, features[0]) or (B is not None and B.shape != (features[1], rank)):
            has = "has none for it" if made is None else f"has shapes {made[0]} and {made[1] or 'zero'}"
            raise TargetError(
                f"init: {self.config.init!r} was prepared for another model: layer {path!r} starts with A {(rank, features[0])} "
                f"and B {(features[1], rank)}, and what was prepared {has}. Make it of this bank with "
                f"lorabank.{self.config.init}."
            )
        return SlotValues(A, B, None, False, rank, scaling)


_WAY_OUT = {
    "eva": "It is made from data: bank.add(name, lorabank.eva(bank, batches, config)), or `init: eva` in a training run.",
    "loftq": "It is made from the weights before quantisation: bank.add(name, lorabank.loftq(bank, original, config)), or "
    "`init: loftq` with `base_dtype: nf4` or `fp8` in a training run.",
}


def check_prepared(config: AdapterConfig) -> None:
    """Raise ConfigError for a configuration whose start must be prepared first."""
    if config.init in PREPARED:
        raise ConfigError(Setting("init"), f": {config.init!r} can't be made from a configuration alone. {_WAY_OUT[config.init]}")
