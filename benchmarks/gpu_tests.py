"""The tests that need a GPU, file by file: which of them passed on which GPU, at which commit.

    python benchmarks/gpu_tests.py --output benchmarks/results/gpu-tests-h200.json --limit 540 --workers 3
    python benchmarks/gpu_tests.py --files tests/gpu/test_laws.py --output laws.json      # a part

Each file is a pytest session in a process of its own (gpu_tests_session.py), which notes every test as soon as it is done. One
that is stopped, since the limit is up, or dies leaves tests that are not finished; those never count as passed, nor does a file
that wasn't begun. The exit status is 0 where all files are finished and nothing in them failed. The page of what passed:
gpu_table.py --readme.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cells import markdown
from gpu_notes import origins
from gpu_results import Results, gpu_name

Row = Mapping[str, Any]

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests/gpu", "tests/kernels/gpu")
SESSION = Path(__file__).parent / "gpu_tests_session.py"


def run_file(file: str, until: float) -> dict[str, Any]:
    """The row of a file under ROOT, whose session is ended at the time `until` of the monotonic clock."""
    began = time.monotonic()
    if began >= until:
        return {"file": file, "finished": False, "why": "not begun: the limit was up"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        line = [sys.executable, str(SESSION), str(ROOT / file), str(log)]
        process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=until - began)
            why = f"ended with {process.returncode}: {(out.strip().splitlines() or ['no message'])[-1]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            why = "stopped: the limit was up"
        row = counted(file, log.read_text(encoding="utf-8")) | {"seconds": round(time.monotonic() - began, 1)}
    if row["finished"] and not row["failed"]:
        return row
    print("\n".join(out.splitlines()[-60:]), flush=True)
    return row if row["finished"] else {**row, "why": why}


def counted(file: str, log: str) -> dict[str, Any]:
    """The row of what a session noted. `not_finished` is None where it didn't come to know its tests."""
    noted = [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith("\n")]  # the last may be half of one
    collected = next((entry["collected"] for entry in noted if "collected" in entry), None)
    ended = next((entry["ended"] for entry in noted if "ended" in entry), None)
    tests: dict[str, str] = {entry["test"]: entry["outcome"] for entry in noted if "test" in entry}
    count = {outcome: sum(found == outcome for found in tests.values()) for outcome in ("passed", "failed", "skipped")}
    row: dict[str, Any] = {"file": file, "finished": ended in (0, 1) and collected == len(tests), **count}
    row["not_finished"] = None if collected is None else collected - len(tests)
    return row | {"failures": [name for name, outcome in tests.items() if outcome == "failed"]}


def run_all(files: Sequence[str], args: argparse.Namespace, results: Results) -> int:
    """Run, print and keep each file; the number of those that aren't finished or have failures."""
    until, wrong = time.monotonic() + args.limit, 0
    with ThreadPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(run_file, file, until) for file in files]):
            row = future.result()
            results.add(row)
            wrong += not row["finished"] or row["failed"] > 0
            print(describe(row), flush=True)
    return wrong


def describe(row: Row) -> str:
    """A file in a line."""
    counts = ", ".join(f"{row[key]} {key.replace('_', ' ')}" for key in COUNTS if row.get(key))
    parts = [f"{row['file']:44s} {counts or 'no test'}", *row.get("failures", ()), *([row["why"]] if "why" in row else [])]
    return "; ".join(parts)


COUNTS = ("passed", "failed", "skipped", "not_finished")


# ---- the page -----------------------------------------------------------------------------------------------------------------


def all_passed(row: Row) -> bool:
    """Whether a file was finished, something in it passed and nothing failed."""
    return row["finished"] is True and row["passed"] > 0 and row["failed"] == 0 and row["not_finished"] == 0


def tests_page(runs: Sequence[Row]) -> str:
    """For each file and GPU the latest run in which it was begun, and the latest in which all of it passed."""
    begun: dict[tuple[str, str], tuple[Row, Row]] = {}
    passed: dict[tuple[str, str], Row] = {}
    for run in sorted((run for run in runs if run["kind"] == "tests"), key=lambda run: str(run.get("date"))):
        for row in run["rows"]:
            key = (str(run.get("gpu")), row["file"])
            if "passed" in row or key not in begun:
                begun[key] = (run, row)
            if all_passed(row):
                passed[key] = run
    rows = [
        [
            file,
            gpu,
            *("–" if row.get(key) is None else str(row[key]) for key in COUNTS),
            _when(run),
            _when(passed[gpu, file]) if (gpu, file) in passed else "never",
            ", ".join(row.get("failures", ())) or ("" if row["finished"] else row.get("why", "not finished")),
        ]
        for (gpu, file), (run, row) in sorted(begun.items())
    ]
    header = ("file", "GPU", "passed", "failed", "skipped", "not finished", "run", "all of it last passed", "what is wrong")
    return markdown(header, rows) + "\n\n" + "\n".join(origins("Tests", [(file, found) for (_, file), found in begun.items()]))


def _when(run: Row) -> str:
    return f"{run.get('commit')}, {run.get('date')}"


# ---- the command --------------------------------------------------------------------------------------------------------------


def all_files() -> list[str]:
    """All of FOLDERS, relative to ROOT."""
    return [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--files", nargs="+", metavar="FILE", help=f"instead of all in {' and '.join(FOLDERS)}, as seen from there")
    made.add_argument("--limit", type=float, default=540.0, help="seconds in all")
    made.add_argument("--workers", type=int, default=1, help="files at a time; they share the GPU's memory")
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every file")
    made.add_argument("--commit", help="as for gpu_training.py")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, keep."""
    args = parser().parse_args(arguments)
    gpu = gpu_name()
    if gpu is None:
        sys.exit("gpu_tests.py needs a GPU; on another machine pytest runs those of these tests that need none")
    results = Results.start("tests", args.output, gpu=gpu, revision=args.commit, limit_s=args.limit, workers=args.workers)
    return int(run_all(args.files or all_files(), args, results) > 0)


if __name__ == "__main__":
    sys.exit(main())
