"""Result files of the GPU benchmarks: one JSON a run, rewritten after every row: a run that is killed keeps what it had.

A run is `{kind, date, commit, gpu, gpu_uuid, versions, check, rows}`; several runs may be kept in one file as `{"runs": [...]}`.
`gpu_uuid` names the very card, None where nobody could tell; runs recorded before 2026-11-29 lack it. Nothing here imports torch:
the table is made on any machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

KINDS = ("training", "peers", "kernels", "families", "experts", "tests")
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "unsloth", "unsloth_zoo", "liger_kernel", "bitsandbytes", "torchao"),
    *("flash-attn-4", "nvidia-cutlass-dsl"),
)
"""Those of them that are installed are named in a run."""


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it; `unknown` where the folder isn't a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a machine without git
        out = ""
    return out or "unknown"


def gpu_uuid() -> str | None:
    """The first visible GPU's own number, as 32 hexadecimal digits and dashes; None where neither torch nor nvidia-smi has it.

    torch is asked where this process has a GPU open through it; opening one here would take its memory from the peers.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found = plain_uuid(str(getattr(torch.cuda.get_device_properties(0), "uuid", "")))
        if found is not None:
            return found
    return plain_uuid(_nvidia_smi("uuid"))


def gpu_name() -> str | None:
    """The first visible GPU's name as torch has it, asked of nvidia-smi, so that nothing is opened there; None without one."""
    return _nvidia_smi("name") or None


def _nvidia_smi(field: str) -> str:
    """What it says of the first visible GPU; empty where it can't tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", first]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # a machine without it, or one that hangs
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""


def plain_uuid(text: str) -> str | None:
    """What torch and nvidia-smi write differently, GPU-… or without, in one form."""
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.lower())
    return found[0] if found else None


def same_session(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs were one after the other on one machine: same card and date, or same commit and date without a card."""
    if run.get("gpu_uuid") and other.get("gpu_uuid"):
        return same_card(run, other)
    known = run.get("commit") not in (None, "unknown")
    return known and run.get("commit") == other.get("commit") and run.get("date") == other.get("date")


def same_card(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs are known to be of one card and one day."""
    return bool(run.get("gpu_uuid")) and run["gpu_uuid"] == other.get("gpu_uuid") and run.get("date") == other.get("date")


@dataclass
class Results:
    """One run and the file that it is kept in."""

    path: Path | None
    """None: nothing is written."""
    record: dict[str, Any]

    @classmethod
    def start(cls, kind: str, path: Path | None, *, gpu: str | None, revision: str | None, **more: Any) -> Results:
        """An empty run. `revision`: the commit, None to ask git for it."""
        record = {
            "kind": kind, "date": time.strftime("%Y-%m-%d"), "commit": revision or commit(), "gpu": gpu,
            "gpu_uuid": gpu_uuid(), "versions": versions(), **more, "rows": [],
        }  # fmt: skip
        return cls(path, record)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in the file at once."""
        self.record["rows"].append(row)
        self.write()

    def write(self) -> None:
        """The whole file anew; a reader never sees half of it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(self.path.suffix + ".new")
        fresh.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def load_runs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All runs of the files, in order. Exits with the reason where a file isn't a result file."""
    runs: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: {error}")
        each = found.get("runs", [found]) if isinstance(found, dict) else []
        for run in each:
            if not isinstance(run, dict) or run.get("kind") not in KINDS or not isinstance(run.get("rows"), list):
                sys.exit(f"{path}: expected runs of kind {', '.join(KINDS)} with rows, as benchmarks/gpu_*.py write them")
            runs.append(run)
        if not each:
            sys.exit(f"{path}: holds no run")
    return runs


def save_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    """Several runs in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
