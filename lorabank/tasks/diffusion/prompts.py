"""What `predict` draws: captions from a file, and who draws them: adapters, the base, and mixtures of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lorabank.bank.routing import BASE, RowRoute
from lorabank.config.checks import is_finite
from lorabank.data.files import read_text
from lorabank.data.read import Source, read_rows
from lorabank.errors import ConfigError, DataError, Setting, closest
from lorabank.tasks.picture_bytes import SUFFIXES
from lorabank.training.base_rows import BASE_NAME
from lorabank.training.next_steps import Ask

COLUMNS = ("prompt", "text", "caption")


def read_captions(source: Source, limit: int | None) -> list[str]:
    """One a line of a `.txt`, else a column `prompt`, `text` or `caption`. Raises DataError for a row without."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".txt" and path.is_file():
        lines = [line.strip() for line in read_text(path).splitlines()]
        found = [line for line in lines if line][:limit]
        if not found:
            raise DataError(f"{path}: no prompts there: expected one a line")
        return found
    found = []
    for row in read_rows(source, limit=limit, role="test"):
        column = next((name for name in COLUMNS if name in row.values), None)
        if column is None:
            raise DataError(f"{row.origin}: expected a caption in a column {', '.join(COLUMNS)}, got {', '.join(row.values)}")
        value = row.values[column]
        if not isinstance(value, str) or not value.strip():
            got = "an empty one" if value is None or isinstance(value, str) else type(value).__name__
            raise DataError(
                f"{row.origin}: expected a caption in column {column!r}, got {got}. Nothing was drawn; correct the row."
            )
        found.append(value)
    return found


def routes_of(names: Sequence[str], mixes: Sequence[str], known: Collection[str]) -> dict[str, RowRoute]:
    """Heading → route. `mixes`: such as `a:0.5,b:0.5`. Raises ConfigError for what isn't one, or an adapter that isn't loaded."""
    routes: dict[str, RowRoute] = {name: BASE if name == BASE_NAME else name for name in names}
    for mix in mixes:
        routes[mix] = parse_mix(mix, known)
    return routes


def examples(names: Sequence[str]) -> list[Ask]:
    """What a run of these adapters can be asked: a caption, and one by all of them mixed."""
    alone = {"prompt": "a caption"}
    mix = ",".join(f"{name}:{1 / len(names):.2g}" for name in names)
    options = [alone, {**alone, "mix": [mix]}] if len(names) > 1 else [alone]
    return [Ask(data=None, output="pictures", options=each) for each in options]


def one_file(output: Path, captions: Sequence[str], headings: Sequence[str]) -> bool:
    """Whether `output` names a picture's file, rather than a folder. Raises ConfigError where several pictures would go there."""
    kind = output.suffix.lower()
    if kind not in SUFFIXES:
        return False
    if kind != ".png":
        raise ConfigError(
            Setting("output"), f": {output.name}: pictures are written as PNG. Name a .png file for one picture, or a folder."
        )
    count = len(captions) * len(headings)
    if count > 1:
        raise ConfigError(
            Setting("output"),
            f": {output.name} is one picture's file, and {count} are asked for ({len(captions)} × {', '.join(headings)}). Name a "
            "folder, or ask for one: a caption (--prompt) by one of them (--adapters).",
        )
    return True


def parse_mix(text: str, known: Collection[str]) -> Mapping[str, float]:
    """`a:0.5,b:0.5` as a route."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition(":")
        if not name or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", number) or not is_finite(float(number)):
            raise ConfigError(f"mix: expected adapters with weights, such as a:0.5,b:0.5, got {part.strip()!r} in {text!r}")
        if name not in known:
            raise ConfigError(f"mix: no adapter {name!r}{closest(name, known)}. There are: {', '.join(known) or 'none'}")
        weights[name] = weights.get(name, 0.0) + float(number)
    return weights
