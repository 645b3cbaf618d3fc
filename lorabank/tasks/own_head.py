"""The base's own head beside adapters that have heads of their own: its labels are others, or it was never trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorabank.errors import ConfigError, Setting
from lorabank.training.base_rows import BASE_NAME, is_base
from lorabank.wording import counted

SHOWN = 3


def keeps_own_head(saved: Sequence[str] | None) -> bool:
    """Whether an adapter with this `modules_to_save` has no head of its own, and uses the model's."""
    return saved is not None and not saved


def names_given(labels: Sequence[str] | None, outputs: int, section: str) -> tuple[str, ...] | None:
    """The setting `labels` of a section as names of a head that nobody named. Raises ConfigError for another number of them."""
    if labels is None:
        return None
    if len(labels) != outputs:
        raise ConfigError(
            Setting(f"{section}.labels"),
            f": {counted(len(labels), 'name')}, and the model's own head, which modules_to_save: [] keeps, gives {outputs}. Name "
            "them all, in their order.",
        )
    return tuple(labels)


def check_numbers(name: str, found: Iterable[str], known: Sequence[str], section: str) -> None:
    """Raise ConfigError where rows have other labels than the numbers of a head that is kept and that nobody named."""
    if strange := [label for label in found if label not in known]:
        shown = ", ".join(map(repr, strange[:SHOWN])) + (", …" if len(strange) > SHOWN else "")
        raise ConfigError(
            Setting(f"adapters.{name}.modules_to_save"),
            f": [] keeps the model's own head. Nobody named its {counted(len(known), 'output')} ({known[0]} to {known[-1]}), so "
            f"which of them the rows' {shown} are isn't known. Name them in their order with ",
            Setting(f"{section}.labels"),
            ", or leave modules_to_save out: each adapter gets a head of its own then.",
        )


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
