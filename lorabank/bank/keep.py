"""Other adaptation modules that a model carries: which parameters go on training beside the bank.

A bank freezes the model. A bottleneck, a prefix, a head or another PEFT method that is in it already goes on training if
`attach(model, keep_trainable=…)` names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorabank.bank.stacked.stacks import ExpertStack, stacks_of
from lorabank.errors import ConfigError, TargetError, closest

Matcher = Callable[[str, str], bool]
"""(pattern, path) → whether it names it."""


def kept_parameters(model: nn.Module, patterns: str | Sequence[str], matches: Matcher) -> frozenset[str]:
    """Names of the parameters that go on training: those that `patterns` name, by themselves or by a module above them.

    Raises ConfigError for a pattern that names none, or none that trains.
    """
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    kept: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        named = {name for name in trains if any(matches(pattern, above) for above in _and_above(name))}
        if not named:
            known = {part for name in trains for part in name.split(".") if not part.isdigit()}
            raise ConfigError(f"keep_trainable: {pattern!r} names no parameter or module of the model{closest(pattern, known)}")
        if not any(trains[name] for name in named):
            raise ConfigError(
                f"keep_trainable: none of what {pattern!r} names trains ({min(named)} and so on have requires_grad=False). Call "
                "requires_grad_(True) on what should, before attach."
            )
        kept |= {name for name in named if trains[name]}
    if len(kept) == len(trains):
        raise ConfigError(
            "keep_trainable: every parameter of the model would go on training, so there is no frozen base. Name the modules "
            "that were added to it."
        )
    return frozenset(kept)


def _and_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def kept_modules(kept: Collection[str]) -> frozenset[str]:
    """Paths of the modules that these parameters are in, and the parameters' own names, which stacks of experts go by."""
    return frozenset(name.rpartition(".")[0] for name in kept) | frozenset(kept)


def stack_trains(path: str, stack: ExpertStack, kept: Collection[str]) -> bool:
    """Whether a stack of experts, or the other one of its module, trains itself: which rules adapters out."""
    return any(f"{path.rpartition('.')[0]}.{name}" in kept for name in stacks_of(stack.experts))


def check_stacks_frozen(name: str, layers: Mapping[str, nn.Module], kept: Collection[str]) -> None:
    """Raise TargetError where a loaded adapter changes stacked experts that train themselves, which isn't supported."""
    stacks = {path: layer for path, layer in layers.items() if isinstance(layer, ExpertStack)}
    if path := next((path for path, stack in stacks.items() if stack_trains(path, stack, kept)), None):
        raise TargetError(
            f"adapter {name!r} changes the experts {path!r}, whose base weight trains beside it (keep_trainable). Leave them out "
            "of keep_trainable, or load it into a bank over another copy of the model."
        )


def warn_stopped(model: nn.Module, kept: Collection[str]) -> None:
    """Warn where few parameters train in a model that is frozen for the most part: someone chose them, and they stop."""
    stopped = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in kept}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and _is_weight(p))
    if stopped and sum(p.numel() for p in stopped.values()) < frozen:
        first = ", ".join(list(stopped)[:3]) + (" …" if len(stopped) > 3 else "")
        warnings.warn(
            f"attach: {len(stopped)} parameters trained in a model that is frozen otherwise ({first}), and are frozen now, until "
            "bank.detach(). attach(model, keep_trainable=[...]) with their names, or their modules', goes on training them.",
            stacklevel=3,
        )


def _is_weight(p: Tensor) -> bool:
    """Whether someone froze it: what is stored in fewer than 16 bits can't train anyway."""
    return p.is_floating_point() and torch.finfo(p.dtype).bits >= 16
