"""`SaveAdapterCallback`: transformers' Trainer (and TRL's trainers) save the frozen base; this saves the adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorabank.bank.bank import AdapterBank


class SaveAdapterCallback(TrainerCallback):
    """Writes adapters of a bank into every checkpoint folder that the Trainer makes, and into its output folder at the end.

    `Trainer(..., callbacks=[lorabank.SaveAdapterCallback(bank, "formal")])`; without names, all adapters of the bank.
    """

    def __init__(self, bank: AdapterBank, *names: str) -> None:
        self._bank, self._names = bank, names

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each checkpoint."""
        self._save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the last step."""
        self._save(Path(str(args.output_dir)))

    def _save(self, folder: Path) -> None:
        for name in self._names or self._bank.names:
            self._bank.adapter(name).save(folder / name)
