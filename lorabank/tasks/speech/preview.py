"""What `lorabank preview` shows of recordings with transcripts: tokens, seconds, and what the model hears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorabank.data.preview import Printer
from lorabank.tasks.spectrograms import Panel, spectrograms
from lorabank.tasks.speech.audio import load_sound
from lorabank.tasks.speech.rows import SpeechRow, changes_of
from lorabank.tasks.speech.tokens import SpeechTokens
from lorabank.tasks.speech.transcripts import STEP_S
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.speech.task import SpeechRecognition

FILE = "log-mel.png"


def preview(task: SpeechRecognition, rows: Sequence[SpeechRow], out: Printer) -> Mapping[str, bytes]:
    """A title and the tokens a row, and one picture of the features."""
    panels = []
    out.legend()
    for row in rows:
        about = [f"{row.seconds:.2f} s", *changes_of(load_sound(row.source, row.rate, near=row.near), row.rate)]
        out.title(
            f"{row.origin}: {row.prompt_text}: {', '.join(about)}; {counted(len(row.labels), 'token')}, {row.tokens} trained"
        )
        _tokens(row, task.tokens, out)
        (features_MF,) = task.hearing.features([row.samples()], task.device)
        panels.append(Panel(title=f"{row.prompt_text}: {row.text}", mel_TM=features_MF.T.numpy(), seconds=task.hearing.window))
    return {FILE: spectrograms(panels)}


def _tokens(row: SpeechRow, tokens: SpeechTokens, out: Printer) -> None:
    tokenizer: Any = tokens.tokenizer
    special = {token for token in row.labels if token >= tokens.end}

    def decode(ids: list[int]) -> str:  # marks and times by themselves: the tokenizer's own decoding leaves times out
        return "".join(map(_mark, ids)) if ids[0] in special else str(tokenizer.decode(ids))

    def _mark(token: int) -> str:
        since = token - tokens.first_timestamp
        return f"<|{since * STEP_S:.2f}|>" if since >= 0 else str(tokenizer.convert_ids_to_tokens(token))

    out.tokens(row.labels, tokenizer, learned=row.tokens, decode=decode, special=special)
