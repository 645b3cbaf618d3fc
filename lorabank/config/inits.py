"""The names of how an adapter starts, `AdapterConfig.init`. What each does stands in bank/init.py and bank/starts/spectral.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorabank.errors import ConfigError, Setting, closest

RANDOM = ("uniform", "gaussian", "orthogonal")
"""A, or A and B, drawn from the seed; ΔW begins at zero."""
DIFFERENCES = ("pissa", "olora")
"""A and B out of the base weight; the adapter's change is its difference from there. Also `pissa_niter_<n>`."""
PREPARED = ("eva", "loftq")
"""Out of data, or of the weights before quantisation: made by `lorabank.eva`, `lorabank.loftq`, or by a training run."""
_NITER = re.compile(r"pissa_niter_(\d+)")


def is_difference(init: str) -> bool:
    """Whether the adapter's change is scaling · (B A − B₀ A₀), A₀ and B₀ being where it starts."""
    return init in DIFFERENCES or _NITER.fullmatch(init) is not None


def niter(init: str) -> int | None:
    """Subspace iterations of `pissa_niter_<n>`, None for other names."""
    found = _NITER.fullmatch(init)
    return None if found is None else int(found[1])


def check_init(init: object, *, use_dora: bool) -> None:
    """Raise ConfigError for a name that isn't one, and for what doesn't go with it."""
    known = (*RANDOM, *DIFFERENCES, *PREPARED)
    if not isinstance(init, str) or not (init in known or is_difference(init)):
        options = ", ".join((*RANDOM, "pissa", "pissa_niter_<n>", *DIFFERENCES[1:], *PREPARED))
        raise ConfigError(Setting("init"), f": expected one of {options}, got {init!r}{closest(str(init), known)}")
    if use_dora and init not in ("uniform", "gaussian"):
        raise ConfigError(
            Setting("init"),
            f": {init!r} doesn't go with use_dora, whose magnitudes are the base weight's own. Use init 'uniform', or leave "
            "use_dora out.",
        )


PEFT_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "eva_config": {
        "rho": 2.0,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    },
    "loftq_config": {"loftq_iter": 1},
}
"""Sections of a LoraConfig that PEFT fills in by itself → what of them is done here. How many bits LoftQ has is the base's."""


def is_default_section(name: str, value: object) -> bool:
    """Whether a section of a LoraConfig asks for nothing but what `lorabank.eva` and `lorabank.loftq` do by themselves."""
    known = PEFT_DEFAULTS.get(name)
    return known is not None and isinstance(value, Mapping) and all(value.get(key, own) == own for key, own in known.items())
