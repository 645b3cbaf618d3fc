"""`RunFolder`: what a run leaves on the disk, and where.

out/support/formal/      the adapter of the best validation loss, tokenizer, model card; formal/last/ the last step's
out/support/checkpoints/step-200/   config.yaml   metrics.jsonl   loss.png   samples.md   data_report.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorabank.config.parse import dump_yaml
from lorabank.config.train import TrainConfig
from lorabank.errors import OutputError
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.training.evaluate import Generated


class RunFolder:
    """Paths and writers of one run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The events of the run."""
        return self.path / "metrics.jsonl"

    def refuse_existing(self) -> None:
        """Raise OutputError, with the line that resumes it, when something is there already."""
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise OutputError(
                f"{self.path}: the output folder exists. To go on with that run: lorabank train {self.path} --resume. "
                "Otherwise choose another output."
            )

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write `config.yaml`. Raises OutputError when something is there already."""
        self.refuse_existing()
        write_files(self.path, {"config.yaml": dump_yaml(config).encode()})

    def write_reports(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """`data_report.json`, one entry a data set."""
        write_files(self.path, {"data_report.json": (json.dumps(reports, indent=2, ensure_ascii=False) + "\n").encode()})

    def save_adapter(self, name: str, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, *, last: bool = False) -> Path:
        """The adapter in PEFT's form, with the tokenizer and its chat template beside it."""
        folder = self.path / name / "last" if last else self.path / name
        adapter.save(folder)
        if not last:
            try:
                tokenizer.save_pretrained(str(folder))
            except OSError as error:
                raise OutputError(f"{folder}: the adapter is saved, its tokenizer couldn't be: {error}") from error
        return folder

    def write_samples(self, pass_index: int, prompts: Sequence[Generated]) -> None:
        """Append held-out prompts with every model's answer to `samples.md`."""
        lines = [f"## After pass {pass_index}", ""]
        for sample in prompts:
            lines += [f"**Prompt** `{_one_line(sample.prompt)}`", "", "| | |", "|---|---|"]
            lines += [f"| reference | {_cell(text)} |" for text in sample.references[:2]]
            lines += [f"| {name} | {_cell(text)} |" for name, text in sample.answers.items()]
            lines.append("")
        with open(self.path / "samples.md", "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def write_hardest(self, hardest: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """`hardest_rows.json`: the training rows with the highest loss, by adapter."""
        write_files(self.path, {"hardest_rows.json": (json.dumps(hardest, indent=2, ensure_ascii=False) + "\n").encode()})


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
