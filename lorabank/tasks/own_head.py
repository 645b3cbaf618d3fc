"""The base's own head beside adapters that have heads of their own: its labels are others, or it was never trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorabank.errors import ConfigError
from lorabank.training.base_rows import BASE_NAME, is_base
from lorabank.wording import counted

SHOWN = 3


def check_trained(names: Sequence[str], model: object, *, named: bool) -> None:
    """Raise ConfigError where the base is asked, and nobody named what its head's outputs mean."""
    if not named and any(map(is_base, names)):
        raise ConfigError(
            f"{type(model).__name__}: the base's own head was never trained (its labels have no names), so `{BASE_NAME}` says "
            "nothing. Name adapters alone (--adapters)."
        )


def base_note(names: Sequence[str], base: Sequence[str], others: Iterable[Sequence[str]]) -> str:
    """What a sentence on predictions ends with where the base gives other labels than the adapters beside it; else nothing.

    base, others: labels of the base's own head, and of each adapter.
    """
    if not any(map(is_base, names)) or all(set(own) == set(base) for own in others):
        return ""
    shown = ", ".join(base[:SHOWN]) + (", …" if len(base) > SHOWN else "")
    return f" ({BASE_NAME} by its own head, of {counted(len(base), 'other label')}: {shown})"


def numbered(labels: Sequence[str]) -> bool:
    """Whether labels are what transformers calls them where nobody named them."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))
