"""Peer systems on the work of the GPU table, each in a process of its own with a time limit. Run it beside gpu_training.py.

    python benchmarks/gpu_peers.py --tokenizer FOLDER --output peers.json           # Unsloth on every line that it has
    python benchmarks/gpu_peers.py --peers all --output peers.json                  # PEFT, Liger and compiled PEFT too
    python benchmarks/gpu_peers.py --list

The work is done by `--script` (peers_gpu.py), whose JSON lines are kept with the item they belong to. A peer that fails or
takes too long is named, and the others go on; the file is rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_results import Results


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer on one item of gpu_training.py."""

    item: str
    impl: str
    rows: int
    tokens: int
    checkpoints: int = 0
    """1: recomputation; 2: Unsloth's offloaded checkpoints."""
    cap_gib: float | None = None
    usual: bool = False
    """Whether it runs when no peers are named."""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return f"{self.impl}:{self.item}" + (":plain" if self.impl.startswith("unsloth") and self.checkpoints == 1 else "")

    def command(self, args: argparse.Namespace) -> list[str]:
        """Its process."""
        line = [sys.executable, str(args.script), "--impl", self.impl, "--layers", str(args.layers), "--steps", str(args.steps)]
        line += ["--bs", str(self.rows), "--seq", str(self.tokens), "--ckpt", str(self.checkpoints)]
        line += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
        return line + (["--cap-gib", str(self.cap_gib)] if self.cap_gib else [])


PEERS = (
    Peer(item="one-2x2048", impl="unsloth", rows=2, tokens=2048, usual=True),
    Peer(item="one-1x512", impl="unsloth", rows=1, tokens=512, usual=True),
    Peer(item="one-4x2048-recompute", impl="unsloth", rows=4, tokens=2048, checkpoints=2, usual=True),
    Peer(item="nf4-2x2048-recompute", impl="unsloth-qlora", rows=2, tokens=2048, checkpoints=2, cap_gib=24.0, usual=True),
    Peer(item="nf4-2x2048-recompute", impl="unsloth-qlora", rows=2, tokens=2048, checkpoints=1, cap_gib=24.0),
    Peer(item="one-2x2048", impl="peft-liger", rows=2, tokens=2048),
    Peer(item="one-2x2048", impl="peft-compile", rows=2, tokens=2048),
    Peer(item="one-2x2048", impl="peft", rows=2, tokens=2048),
    Peer(item="one-4x2048-recompute", impl="peft-liger", rows=4, tokens=2048, checkpoints=1),
    Peer(item="one-4x2048-recompute", impl="peft", rows=4, tokens=2048, checkpoints=1),
    Peer(item="one-1x512", impl="peft", rows=1, tokens=512),
    Peer(item="peak", impl="peak", rows=1, tokens=1),
)


def run(command: Sequence[str], limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """(the JSON lines that a process printed, why there are none). It is ended, its children too, when the time is up."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [], f"not done in {limit_s:.0f} s"
    found = parse_lines(out)
    if process.returncode or not found:
        last = (err.strip().splitlines() or ["no message"])[-1]
        return [], f"ended with {process.returncode}: {last}"
    return found, ""


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects with an `impl`; libraries print others."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "impl" in value:
            found.append(value)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    made.add_argument("--peers", nargs="+", choices=[*names, "all"], metavar="NAME", help=f"all, or of {', '.join(names)}")
    made.add_argument("--script", type=Path, default=Path(__file__).parent / "peers_gpu.py", help="what runs a peer")
    made.add_argument("--tokenizer", type=Path, help="folder with any small tokenizer, which Unsloth wants beside the model")
    made.add_argument("--limit", type=float, default=240.0, help="seconds for each peer")
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--output", type=Path)
    made.add_argument("--commit", help="as for gpu_training.py")
    made.add_argument("--list", action="store_true", help="print the names")
    return made


def chosen(names: Sequence[str] | None) -> list[Peer]:
    """The peers of these names, in the order of the table."""
    if names is None:
        return [peer for peer in PEERS if peer.usual]
    return [peer for peer in PEERS if "all" in names or peer.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, keep."""
    args = parser().parse_args(arguments)
    if args.list:
        print("\n".join(peer.name + ("  (usual)" if peer.usual else "") for peer in PEERS))
        return 0
    results = Results.start("peers", args.output, gpu=None, revision=args.commit)
    failures: dict[str, str] = {}
    for peer in chosen(args.peers):
        rows, why = run(peer.command(args), args.limit)
        for row in rows:
            results.record["gpu"] = row.get("gpu")
            results.add({"item": peer.item, "name": peer.name, **row})
            print(f"{peer.name:44s} {json.dumps(row)}", flush=True)
        if not rows:
            failures[peer.name] = why
            results.record["failures"] = failures
            results.write()
            print(f"{peer.name:44s} not run: {why}", flush=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
