"""`RunFolder`: what a run leaves on the disk, and where.

out/support/formal/      the adapter of the best validation loss, tokenizer, model card; formal/last/ the last step's
out/support/checkpoints/step-200/   config.yaml   metrics.jsonl   loss.png   samples.md   data_report.json
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorabank.config.parse import dump_yaml, load_config
from lorabank.config.train import TrainConfig
from lorabank.errors import AdapterNameError, CheckpointError, OutputError
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.training.evaluate import Generated
from lorabank.training.markdown import cell
from lorabank.training.metrics_file import count_lines

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""What `write_files` writes to before it renames."""
OWN_NAMES = (
    "checkpoints",
    "config.yaml",
    "data_report.json",
    "hardest_rows.json",
    "loss.png",
    "metrics.jsonl",
    "samples",
    "samples.md",
    "samples.png",
    "tensorboard",
    "wandb",
)
"""What a run folder holds beside its adapters."""


def check_folder_name(name: str) -> None:
    """Raise AdapterNameError where an adapter's folder would stand in the way of another file of the run."""
    if name.lower() in OWN_NAMES:
        raise AdapterNameError(
            f"adapter {name!r}: a run folder has a file of that name. Choose another, such as {name.split('.')[0]}_1."
        )


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

    def metrics_lines(self) -> int:
        """Lines that the metrics file has now."""
        return count_lines(self.metrics)

    def refuse_existing(self) -> None:
        """Raise OutputError, with the line that resumes it, when something is there already."""
        if self.path.is_file():
            raise OutputError(f"{self.path}: expected a folder for the run, got a file. Choose another output.")
        if not self.path.is_dir() or all(_TEMPORARY.fullmatch(path.name) for path in self.path.iterdir()):
            return
        way = "It isn't a run of lorabank"
        if (self.path / "config.yaml").is_file():
            way = f"To go on with that run: {resume_line(self.path)}"
        raise OutputError(f"{self.path}: the output folder exists and isn't empty. {way}. Or choose another output.")

    def check_resumable(self) -> TrainConfig:
        """The configuration of the run that is in the folder. Raises CheckpointError when there is none."""
        if not (self.path / "config.yaml").is_file():
            what = "it holds no run (no config.yaml)" if self.path.is_dir() else "there is no such folder"
            raise CheckpointError(f"{self.path}: nothing to resume: {what}. Leave resume out to start the run.")
        return load_config(self.path)[0]

    def tidy(self) -> None:
        """Remove half-written files that a kill left behind."""
        for path in list(self.path.rglob(".*.tmp")):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write `config.yaml`. Raises OutputError when something is there already."""
        self.refuse_existing()
        self.tidy()
        write_files(self.path, {"config.yaml": dump_yaml(config)})

    def write_reports(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """`data_report.json`, one entry a data set."""
        write_files(self.path, {"data_report.json": json.dumps(reports, indent=2, ensure_ascii=False) + "\n"})

    def save_adapter(self, name: str, adapter: Adapter, processor: Any) -> Path:
        """The adapter in PEFT's form, with what prepares its inputs (tokenizer and chat template, …; None: nothing) beside it.

        `name` may be `formal/last`.
        """
        folder = self.path / name
        adapter.save(folder)
        if processor is not None:
            try:
                processor.save_pretrained(str(folder))
            except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
                what = "tokenizer" if isinstance(processor, PreTrainedTokenizerBase) else type(processor).__name__
                raise OutputError(f"{folder}: the adapter is saved, its {what} couldn't be: {error}.") from error
        return folder

    def write_hardest(self, hardest: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """`hardest_rows.json`: the training rows with the highest loss, by adapter."""
        write_files(self.path, {"hardest_rows.json": json.dumps(hardest, indent=2, ensure_ascii=False) + "\n"})


def write_samples(folder: Path, prompts: Sequence[Generated]) -> None:
    """`samples.md`: held-out prompts with every model's answer."""
    lines = ["# Answers to held-out prompts", ""]
    for sample in prompts:
        lines += [f"**Prompt** `{_one_line(sample.prompt)}`", "", "| | |", "|---|---|"]
        lines += [f"| reference | {cell(text)} |" for text in sample.references[:2]]
        lines += [f"| {name} | {cell(text)} |" for name, text in sample.answers.items()]
        lines.append("")
    write_files(folder, {"samples.md": "\n".join(lines) + "\n"})


def resume_line(path: Path) -> str:
    """The command that goes on with the run in `path`."""
    return shlex.join(["lorabank", "train", str(path), "--resume"])


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
