"""Rows as a source and a target: columns by name, `translation: {en: …, de: …}`, prompt and completion, or templates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.train import DataConfig
from lorabank.data.formats import Normaliser, template_columns, text_of
from lorabank.data.row import Row, RowError, quoted
from lorabank.errors import DataError, Setting, closest

NAMES = (
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("source", "target"),
    ("src", "tgt"),
    ("input", "output"),
    ("input", "target"),
    ("question", "answer"),
)
"""Columns of source and target: of XSum, CNN/DailyMail, SAMSum, and as others call them."""
TRANSLATION = "translation"
"""Column that holds a text for each language."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row as text."""

    source: str
    target: str | None
    """None where the row is only predicted."""
    origin: str
    group: str | None = None
    """Value of the column `group_by`, if one is set."""


class PairReader:
    """Reads rows of one source. It fails at once where the first row shows that no row can fit; later misfits are RowErrors."""

    def __init__(self, data: DataConfig, config: Seq2SeqConfig, first: Row, *, need_target: bool = True) -> None:
        self.data, self.config, self.need_target = data, config, need_target
        self.described = ""
        """What is read, for people."""
        self._columns = self._find(first)
        self._normaliser = Normaliser(data) if self._columns is None and need_target else None

    def __call__(self, row: Row) -> Pair:
        """The row's texts. Raises RowError."""
        try:
            source, target = self._texts(row)
            if not source.strip():
                raise RowError("the source is empty")
            if target is not None and not target.strip():
                raise RowError("the target is empty")
            group = None if self.data.group_by is None else text_of(row.values, self.data.group_by, may_be_empty=True)
        except RowError as error:
            raise error.at(row.origin) from error
        return Pair(source=source, target=target, origin=row.origin, group=group)

    # ---- which columns ------------------------------------------------------------------------------------------------

    def _find(self, first: Row) -> tuple[str, str] | None:
        """Columns (or languages) of source and target; None where `data`'s templates, or prompt and completion, say."""
        config, names = self.config, list(first.values)
        if config.source is not None and config.target is not None:
            for setting, column in (("source", config.source), ("target", config.target)):
                if column not in names and (setting == "source" or self.need_target):
                    raise DataError(
                        Setting(f"seq2seq.{setting}"),
                        f": {first.origin} has no column {column!r}{closest(column, names)}; it has {quoted(names)}",
                    )
            return self._say(config.source, config.target)
        if self.data.prompt is not None:
            if not self.need_target:
                self._check_template(first)
            self.described = f"source: {self.data.prompt!r}, target: {self.data.completion!r}"
            return None
        if isinstance(first.values.get(TRANSLATION), Mapping):
            return self._languages(first)
        if "prompt" in names:
            self.described = "columns: 'prompt' as the source, 'completion' as the target"
            return None
        for source, target in NAMES:
            if source in names and (target in names or not self.need_target):
                return self._say(source, target)
        if config.source_lang is not None and config.target_lang is not None:
            source, target = _language(names, config.source_lang), _language(names, config.target_lang)
            if source is not None and (target is not None or not self.need_target):
                return self._say(source, target or config.target_lang)
        if not self.need_target or not {"instruction", "messages", "conversations"} & set(names):
            known = ", ".join(f"{source} and {target}" for source, target in NAMES)
            raise DataError(
                f"{first.origin}: no columns of source and target: expected {known}, prompt and completion, or translation; got "
                f"{quoted(names)}. Name them with ",
                Setting("seq2seq.source"),
                " and ",
                Setting("seq2seq.target"),
                ".",
            )
        return None

    def _say(self, source: str, target: str) -> tuple[str, str]:
        self.described = f"columns: {source!r} as the source, {target!r} as the target"
        return source, target

    def _languages(self, first: Row) -> tuple[str, str]:
        texts: Any = first.values[TRANSLATION]
        codes = self.config.source_lang, self.config.target_lang
        found = [None if code is None else _language(texts, code) for code in codes]
        if found[0] is None or (found[1] is None and self.need_target):
            raise DataError(
                f"{first.origin}: column {TRANSLATION!r} holds {quoted(list(texts))}. Say which is the source and which the "
                "target with ",
                Setting("seq2seq.source_lang"),
                " and ",
                Setting("seq2seq.target_lang"),
                f" (they are {codes[0]!r} and {codes[1]!r}).",
            )
        self.described = f"column {TRANSLATION!r}: {found[0]} to {found[1] or codes[1]}"
        return found[0], found[1] or ""

    def _check_template(self, first: Row) -> None:
        for column in template_columns(str(self.data.prompt), place="data.prompt"):
            if column not in first.values:
                raise DataError(
                    Setting("data.prompt"), f": no column {column!r} in {first.origin}{closest(column, first.values)}"
                )

    # ---- texts --------------------------------------------------------------------------------------------------------

    def _texts(self, row: Row) -> tuple[str, str | None]:
        values = row.values
        if self._columns is None:
            return self._normalised(row)
        if isinstance(values.get(TRANSLATION), Mapping) and self.config.source is None:
            values = values[TRANSLATION]
        source, target = self._columns
        return text_of(values, source), text_of(values, target) if self.need_target else None

    def _normalised(self, row: Row) -> tuple[str, str | None]:
        if self._normaliser is None:
            if self.data.prompt is None:
                return text_of(row.values, "prompt"), None
            columns = template_columns(self.data.prompt, place="data.prompt")
            texts = {name: text_of(row.values, name, may_be_empty=True) for name in columns}
            return self.data.prompt.format_map(texts), None
        example = self._normaliser(row)
        if example.kind != "completion":
            what = "turns of a chat" if example.kind == "messages" else "text without an answer"
            raise RowError(f"{what}, where a source and a target were expected")
        return example.prompt, example.completion


def _language(names: Collection[str], code: str) -> str | None:
    """The key of a language: the code itself, or what it begins with (`en` for `en_XX`)."""
    options = (code, code.replace("-", "_").split("_")[0])
    return next((option for option in options if option in names), None)
