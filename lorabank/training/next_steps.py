"""`NextSteps`: what a finished run offers, as lines for the shell, or for Python where its base was an object."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Titled = tuple[str, Sequence[str]]
"""A title, and lines that can be copied."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One call of `predict`."""

    data: str | None
    """Rows of one's own, for example; None: the options say what is asked."""
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else is told, by the flag's name: a text, or a list where the flag may be given several times."""

    def command(self, run: str) -> str:
        """For the shell."""
        parts = ["lorabank", "predict", run]
        if self.data is not None:
            parts += ["--data", self.data]
        for name, said in self.options.items():
            for each in said if isinstance(said, list) else [said]:
                parts += [f"--{name}", str(each)]
        return shlex.join([*parts, "--output", self.output])

    def call(self, run: str) -> str:
        """For Python, the model being an object."""
        more = f", options={dict(self.options)!r}" if self.options else ""
        return f"lorabank.predict({run!r}, {self.data!r}, {self.output!r}{more}, model=model)"


@dataclass(frozen=True, kw_only=True)
class NextSteps:
    """What can be done with a run's adapters."""

    title: str
    asks: Sequence[Ask] = ()
    commands: Callable[[str], Sequence[str]] | None = None
    """A run's folder → lines for the shell, where they are no `predict`."""

    def for_shell(self, run: str) -> Titled:
        """Lines for a base that the command line can load."""
        return self.title, self.commands(run) if self.commands is not None else [ask.command(run) for ask in self.asks]

    def for_python(self, run: str) -> Titled:
        """Lines for a base that was given as an object."""
        return self.title, [ask.call(run) for ask in self.asks]
