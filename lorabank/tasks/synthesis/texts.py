"""Texts to be said: lines of a .txt file, or a column of a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorabank.config.paths import expanded
from lorabank.config.synthesis import SynthesisConfig
from lorabank.data.read import Source
from lorabank.data.row import RowError, typical, unusual
from lorabank.errors import DataError, closest
from lorabank.tasks.asked import rows_asked
from lorabank.tasks.speech.names import shown
from lorabank.tasks.speech.read import TEXT_COLUMNS, said_in
from lorabank.tasks.synthesis.rows import Limits, SynthesisRow, speaker_of, token_ids


def texts(
    source: Source, config: SynthesisConfig, processor: Any, limits: Limits, limit: int | None, *, name: str
) -> list[SynthesisRow | RowError]:
    """Each text as the model takes it, or why it can't be said. `name`: of the source, for messages.

    Raises DataError for a file that is missing or has no texts.
    """
    if isinstance(source, str) and (path := expanded(source, place="data.test", kind=DataError)).exists():
        source = str(path)
    rows = rows_asked(source, limit, column=config.text_column or TEXT_COLUMNS[0], blank=True)
    usual = typical(rows)
    columns = usual.values
    column = config.text_column or next((each for each in TEXT_COLUMNS if each in columns), None)
    if column is None or column not in columns:
        raise DataError(f"{name}: no column of text{closest(str(column), columns)}; there are {', '.join(columns)}")
    found: list[SynthesisRow | RowError] = []
    for row in rows:
        origin = shown(row.origin)
        try:
            text = said_in(row.values, column)
            ids, speaker = token_ids(text, processor, limits), speaker_of(row.values, config, limits)
        except RowError as error:
            found.append(RowError(error.reason, origin))
            continue
        found.append(
            SynthesisRow(
                origin=origin,
                name=origin,
                text=text,
                input_ids=ids,
                mel_TM=np.zeros((0, 0), np.float32),
                speaker=speaker,
                seconds=1.0,
                digest=origin,
                unread=unusual(row, usual, (config.speaker_column,)),
            )
        )
    return found
