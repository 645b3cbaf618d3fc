"""Whether adapters that are to be combined were trained on one base: by fingerprint, or by the name that they give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lorabank.errors import FingerprintError
from lorabank.formats.adapter import Adapter


def check_one_base(adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    """Raise FingerprintError for adapters of different bases; warn of other names where fingerprints can't tell.

    `called`: what messages call the adapters.
    """
    known = [(index, adapter.fingerprint) for index, adapter in enumerate(adapters) if adapter.fingerprint]
    for index, fingerprint in known[1:]:
        difference = known[0][1].compare(fingerprint)
        if difference:
            bases = f"{adapters[known[0][0]].base_model or 'unnamed'} and {adapters[index].base_model or 'unnamed'}"
            raise FingerprintError(
                f"combine: {called[known[0][0]]} and {called[index]} were trained on different bases ({bases}): {difference}. "
                "Only adapters of one base can be combined."
            )
    if len(known) < len(adapters):
        _warn_names(adapters, called)


def _warn_names(adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    named = [(name, adapter.base_model) for name, adapter in zip(called, adapters, strict=True) if adapter.base_model]
    other = next((item for item in named[1:] if _short(item[1]) != _short(named[0][1])), None)
    if other is not None:
        warnings.warn(
            f"combine: {named[0][0]} names the base {named[0][1]!r}, {other[0]} {other[1]!r}, and not all hold a fingerprint, by "
            "which that could be checked. If they are two bases, the result is noise: combine adapters of one.",
            stacklevel=5,
        )


def _short(base: str | None) -> str:
    """A base's name without owner and folder, by which one base may be called from different places."""
    return (base or "").rstrip("/").rpartition("/")[2].lower()
