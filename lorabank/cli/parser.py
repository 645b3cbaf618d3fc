"""argparse with our manners: dashes or underscores, no abbreviations, a misspelt flag gets the closest one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lorabank.errors import ConfigError, closest

_NEGATIVE = re.compile(r"-[\d.].*")
"""What begins as a number below zero does."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Examples keep their line breaks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors, so that there is one way to fail."""

    def __init__(self, *args: Any, keep_words: bool = False, **kwargs: Any) -> None:
        """`keep_words`: argparse prints the help alone, the words go to `parse_train_arguments` as `arguments`."""
        self.keep_words = keep_words
        super().__init__(*args, **{"formatter_class": Help, "allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does, unless the words are kept."""
        words = list(args or ())
        if not self.keep_words:
            return super().parse_known_args(words, namespace)
        if "-h" in words or "--help" in words:
            return super().parse_known_args(["--help"], namespace)
        space = namespace or argparse.Namespace()
        space.arguments = words
        space.run = self.get_default("run")
        return space, []

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise ConfigError(f"{message}. `{self.prog} --help` shows what there is.")

    def flags(self) -> list[str]:
        """Every flag that the help names."""
        return re.findall(r"(?<![\w-])--[a-z][\w-]*", self.format_help())

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """Name what wasn't understood, with the closest flag."""
        word = extra[0].partition("=")[0]
        if word.startswith("-"):
            raise ConfigError(f"{word}: unknown flag{closest(word, self.flags())}. `{self.prog} --help` lists them.")
        raise ConfigError(f"{word!r}: not expected here. `{self.prog} --help` shows how it is used.")


def with_dashes(words: Sequence[str]) -> list[str]:
    """`--max_new_tokens=5` as `--max-new-tokens=5`: flags take dash or underscore. `-w -1e-3` as `-w=-1e-3`: a number is none."""
    result: list[str] = []
    for word in words:
        if _NEGATIVE.fullmatch(word) and result and result[-1].startswith("-") and "=" not in result[-1]:
            result[-1] += f"={word}"
            continue
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("_", "-") + equals + value
        result.append(word)
    return result


def names(text: str) -> list[str]:
    """`a,b` as a list, for argparse."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(text: str) -> int:
    """A whole number ≥ 1, for argparse."""
    if not re.fullmatch(r"\+?\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text!r}")
    return int(text)
