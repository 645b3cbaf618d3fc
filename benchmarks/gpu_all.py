"""All GPU tables on one machine, one part after the other: ours, the peers, the kernels, other families; then the tables.

    python benchmarks/gpu_all.py --tokenizer FOLDER --output out      # out/training.json, peers.json, … all.json
    python benchmarks/gpu_all.py --output out                         # without peers

Each part is a process of its own. One that fails is named, what it had measured counts, and the others go on; the exit status is
then 1. A ratio to a peer is of one session this way.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu_results import load_runs, save_runs
from gpu_table import page

HERE = Path(__file__).parent
"""Where the parts are."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True, help="folder for a file of each part and all.json with all runs")
    made.add_argument("--tokenizer", type=Path, help="as for gpu_peers.py; without it no peers run")
    made.add_argument("--items", nargs="+", metavar="ITEM", help="as for gpu_training.py")
    made.add_argument("--peers", nargs="+", metavar="NAME", help="as for gpu_peers.py")
    made.add_argument("--commit", help="as for gpu_training.py")
    return made


def peers_missing(args: argparse.Namespace) -> str | None:
    """Why the peers can't run; None where they can."""
    if args.tokenizer is None:
        return "no --tokenizer"
    return None if importlib.util.find_spec("unsloth") else "unsloth isn't installed"


def run_part(name: str, more: Sequence[str], args: argparse.Namespace) -> tuple[Path | None, bool]:
    """(the file of gpu_<name>.py if it wrote one, whether it went through)."""
    path = args.output / f"{name}.json"
    path.unlink(missing_ok=True)  # of an earlier call
    line = [sys.executable, str(HERE / f"gpu_{name}.py"), "--output", str(path)]
    line += ["--commit", args.commit] if args.commit else []
    status = subprocess.run([*line, *more], check=False).returncode
    if status:
        left = "; what it measured until then counts" if path.exists() else " and left no results"
        print(f"gpu_{name}.py ended with {status}{left}", flush=True)
    return (path if path.exists() else None), status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part, print the table, keep the runs."""
    args = parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {
        "training": ["--items", *args.items] if args.items else [],
        "peers": ["--tokenizer", str(args.tokenizer), *(["--peers", *args.peers] if args.peers else [])],
        "kernels": [],
        "families": [],
    }
    (args.output / "all.json").unlink(missing_ok=True)  # likewise
    why = peers_missing(args)
    if why is not None:
        del parts["peers"]
        print(f"gpu_peers.py skipped: {why}", flush=True)
    done = [run_part(name, more, args) for name, more in parts.items()]
    paths = [path for path, _ in done if path is not None]
    if paths:
        runs = load_runs(paths)
        save_runs(args.output / "all.json", runs)
        print(page(runs))
    return int(not all(through for _, through in done))


if __name__ == "__main__":
    sys.exit(main())
