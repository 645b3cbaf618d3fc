"""`ProcessorKind`: which object prepares a task's inputs, how one that was given is checked, and what lies beside adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorabank.errors import ConfigError, ModelError
from lorabank.models.quiet import quiet_transformers

MADE_WITH = "processor"
"""Key of an adapter's metadata: class of the object that its inputs were prepared with, where another could be made without."""


def _nothing_beside(folder: Path) -> None:
    """For tasks that save nothing beside an adapter."""


@dataclass(frozen=True, kw_only=True)
class ProcessorKind:
    """What a task takes as `tokenizer`."""

    expected: str
    """For messages, with its article: `a tokenizer of transformers, such as AutoTokenizer.from_pretrained(…)`."""
    accepts: Callable[[object], bool]
    """Whether an object is one."""
    beside: Callable[[Path], Any] = _nothing_beside
    """The one that was saved in an adapter's folder; None: there is none. Raises ModelError for one that can't be read."""
    without: str | None = None
    """What is told where none is given and the task does without; None: it needs one."""

    def check(self, given: object, task: str) -> None:
        """Raise ConfigError for an object that prepares no inputs of `task`, or where one is missing."""
        if given is None:
            if self.without is None:
                raise ConfigError(
                    f"tokenizer: missing. {task} with a model given as an object needs {self.expected}. Give it as tokenizer=…"
                )
        elif not self.accepts(given):
            raise ConfigError(f"tokenizer: {task} expects {self.expected}, got {_shown(given)}. Give that in its place.")

    def saved(self, folders: Iterable[Path]) -> Any:
        """The first that lies beside one of the adapters; None where none does."""
        return next((found for folder in folders if (found := self.beside(folder)) is not None), None)


def _shown(given: object) -> str:
    kind = type(given).__name__
    said = repr(given) if isinstance(given, str | int | float) else ""
    return f"the {kind} {said}" if said else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def tokenizer_beside(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, which has the chat template that it was trained with; None without one."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged or exotic tokenizer surfaces as almost any class
        raise ModelError(
            f"{folder}: the tokenizer beside the adapter can't be read ({error}). Delete it to use the base's."
        ) from error


def _is_tokenizer(given: object) -> bool:
    return isinstance(given, PreTrainedTokenizerBase)


TOKENIZER = ProcessorKind(
    expected="a tokenizer of transformers, such as AutoTokenizer.from_pretrained(…)",
    accepts=_is_tokenizer,
    beside=tokenizer_beside,
)
