"""What a resumed run must have in common with its checkpoint: the base, the rows, and the settings that change results."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorabank.bank.bank import AdapterBank
from lorabank.config.train import TrainConfig
from lorabank.errors import CheckpointError
from lorabank.training.data_sets import TaskRow
from lorabank.training.jobs import AdapterJob

_RUN_SETTINGS = ("base_dtype", "task", "gradient_checkpointing", "seed")
_EVAL_SETTINGS = ("every", "max_rows", "batch_size")
"""They decide which step is the best, and when an adapter stops early."""
_PLACES = ("data", "val_data", "init_from")
"""Where something was read from; what was read is compared instead."""
_SHOWN = 4


def run_identity(
    config: TrainConfig, jobs: Mapping[str, AdapterJob], bank: AdapterBank, *, section: str | None = None
) -> dict[str, Any]:
    """Dotted setting, or a name for people, to its value as JSON gives it back. `section`: of the task's own settings."""
    found: dict[str, Any] = {name: getattr(config, name) for name in _RUN_SETTINGS}
    found |= {f"eval.{name}": getattr(config.eval, name) for name in _EVAL_SETTINGS}
    if config.eval.best != "loss":
        found["eval.best"] = config.eval.best
    if section is not None:
        found |= {f"{section}.{key}": value for key, value in asdict(getattr(config, section)).items()}
    found["data.packing"] = config.data.packing
    if config.data.packing:
        found["data.max_length"] = config.data.max_length  # how full a packed row gets
    found["the base model's weights"] = zlib.crc32(json.dumps(bank.fingerprint.to_dict(), sort_keys=True).encode())
    found["adapters"] = sorted(jobs)
    for name, job in jobs.items():
        settings = {key: value for key, value in asdict(job.run).items() if key not in _PLACES}
        settings["learning_rate"] = job.learning_rate  # as it was resolved
        found |= {f"adapters.{name}.{key}": value for key, value in settings.items()}
        found[f"training rows of {name}"] = rows_checksum(job.stream.rows)
        found[f"validation rows of {name}"] = rows_checksum(job.val)
    return json.loads(json.dumps(found))


def check_identity(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless a checkpoint with `saved` can go on under `present`."""
    if saved.get("adapters") != present["adapters"]:
        what = f"adapters: were {', '.join(saved.get('adapters', []))}, are {', '.join(present['adapters'])}"
        raise CheckpointError(_message([what]))
    differing = [key for key in present if saved.get(key) != present[key]]
    if differing:
        raise CheckpointError(_message([_said(key, saved.get(key), present[key]) for key in differing]))


def _said(key: str, was: object, now: object) -> str:
    if " " in key:  # a checksum says nothing to people
        return f"{key} have changed"
    return f"{key}: was {was!r}, is {now!r}"


def _message(parts: Sequence[str]) -> str:
    more = f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return (
        f"the checkpoint belongs to another run: {'; '.join(parts[:_SHOWN])}{more}. Nothing was changed. "
        "Resume with the same settings and data, or start afresh in another output folder (init_from takes the weights along)."
    )


def rows_checksum(rows: Sequence[TaskRow]) -> int:
    """Of what training depends on in the rows, in their order."""
    total = 0
    for row in rows:
        total = zlib.crc32(repr(row.content).encode(), total)
    return total
