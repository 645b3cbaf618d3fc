"""`prepare`: from a DataConfig to token rows in splits, with a report. The one function that training and preview call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.formats import Example, Normaliser
from lorabank.data.hold_out import hold_out, too_few
from lorabank.data.read import Source, read_rows
from lorabank.data.render import Renderer, TokenRow
from lorabank.data.report import DataReport, build_report
from lorabank.data.row import NanError, RowError
from lorabank.data.sources import left_aside, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True)
class PreparedData:
    """Rows ready to be batched, in the order of their sources."""

    train: list[TokenRow]
    val: list[TokenRow]
    test: list[TokenRow]
    report: DataReport


@dataclass(frozen=True)
class _Part:
    """One source, normalised and tokenised: what was kept, in order."""

    examples: list[Example]
    rows: list[TokenRow]


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    train: Source | None = None,
    val: Source | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, normalise, render, tokenise and split.

    `train` and `val` (a path, a `datasets` id or object, or a list of dicts) override the paths of `config`. Rows that can't
    be used are counted in the report by reason, or refused, by `bad_rows`; NaN by `nan_rows`. Faults of a whole file, of the
    settings or of the tokenizer are errors. Equal config, rows and seed give equal splits in any process. Raises DataError
    (missing, empty or malformed data, NaN, no row left, a split that can't be made) and ConfigError.
    """
    sources = sources_of(config, train, val)
    raw = {role: read_rows(source, limit=config.limit, role=role) for role, source in sources.items()}
    renderer = Renderer(tokenizer, config)
    total, done = sum(map(len, raw.values())), 0
    errors: list[RowError] = []
    refused = False  # once there is a NaN, the rest is only searched for more
    forms: dict[str, int] = {}
    notes: dict[str, list[str]] = {}
    parts: dict[str, _Part] = {}
    for role, rows in raw.items():
        normalise = Normaliser(config)
        part = _Part([], [])
        before = len(errors)
        for first in range(0, len(rows), _CHUNK):
            examples = []
            for row in rows[first : first + _CHUNK]:
                try:
                    examples.append(normalise(row))
                except RowError as error:
                    refused = refused or (isinstance(error, NanError) and config.nan_rows == "stop")
                    errors.append(error)
            if refused:
                continue
            for example, result in zip(examples, renderer.render(examples), strict=True):
                if isinstance(result, RowError):
                    errors.append(result)
                else:
                    part.examples.append(example)
                    part.rows.append(result)
            done += len(rows[first : first + _CHUNK])
            if progress is not None:
                progress(done, total)
        if not part.rows and not refused:
            raise nothing_left(role, len(rows), errors[before:])
        for name, count in normalise.forms_seen.items():
            forms[name] = forms.get(name, 0) + count
        for note, origins in normalise.notes.items():
            notes.setdefault(note, []).extend(origins)
        parts[role] = part
    refuse(errors, total, config)
    splits, split_notes = _split(config, parts, seed)
    notes = {**renderer.notes, **notes, **split_notes}
    report = build_report(read=total, errors=errors, forms=forms, notes=notes, splits=splits, facts=left_aside(sources))
    return PreparedData(splits["train"], splits["val"], splits["test"], report)


def _split(config: DataConfig, parts: dict[str, _Part], seed: int) -> tuple[dict[str, list[TokenRow]], dict[str, list[str]]]:
    """Hold rows out of the training source for each split that has no source of its own."""
    source = parts.get("train", _Part([], []))
    # Equal rows stay together even where no group is asked for: a copy in two splits would be a leak.
    keys = [example.key if config.group_by is None else str(example.group) for example in source.examples]
    held = hold_out({role: part.rows for role, part in parts.items()}, keys, config, seed=seed, unit="rows")
    return held.splits, {too_few("rows"): [row.origin for row in source.rows]} if held.spared else {}
