"""What `lorabank preview` shows of texts that were spoken: tokens, seconds, and the spectrum that is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorabank.data.preview import Printer
from lorabank.tasks.spectrograms import Panel, spectrograms
from lorabank.tasks.synthesis.rows import SynthesisRow
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.synthesis.task import SpeechSynthesis

FILE = "log-mel.png"


def preview(task: SpeechSynthesis, rows: Sequence[SynthesisRow], out: Printer) -> Mapping[str, bytes]:
    """A title and the tokens a row, and one picture of the spectra."""
    for row in rows:
        speaker = "a speaker's embedding" if any(row.speaker) else "no speaker's embedding"
        what = f"{row.seconds:.2f} s, {counted(row.frames, 'frame')}, {counted(len(row.input_ids), 'token')}, {speaker}"
        out.title(f"{row.origin}: {row.name}: {what}" if row.name else f"{row.origin}: {what}")
        out.tokens(row.input_ids, task.processor.tokenizer, learned=0)
    return {FILE: spectrograms([Panel(title=row.text, mel_TM=row.mel_TM, seconds=row.seconds) for row in rows])}
