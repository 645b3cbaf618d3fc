"""The benchmarks of tasks on one GPU, one after the other: each a process with a time limit, its log and its JSON in one folder.

    python benchmarks/gpu_tasks.py out/tasks                        # about 30 minutes, most of them compiling
    python benchmarks/gpu_tasks.py out/tasks --only speech text

What runs out of time is said and leaves what it has written; the others run all the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark's call."""

    name: str
    script: str
    arguments: tuple[str, ...]
    limit_s: int
    cold: bool = False
    """Compiles all of its code anew, whatever lies on the disk."""


JOBS = (
    Job(name="text", script="text_classification.py", arguments=("--device", "cuda"), limit_s=200),
    Job(name="images", script="image_classification.py", arguments=("--device", "cuda"), limit_s=420),
    Job(
        name="speech",
        script="speech_recognition.py",
        arguments=("--device", "cuda", "--shape", "small", "--only", "PEFT"),
        limit_s=250,
    ),
    Job(
        name="speech-features-ready",
        script="speech_recognition.py",
        arguments=("--device", "cuda", "--shape", "small", "--features-ready", "--only", "PEFT"),
        limit_s=150,
    ),
    Job(
        name="text-to-image",
        script="text_to_image.py",
        arguments=(
            *("--rounds", "3", "--only"),
            *("peer, batch 4, bf16 adapter", "ours, batch 4", "peer, batch 1, bf16 adapter", "peer, batch 1, fp32 adapter"),
            "ours, eight styles at batch 1",
        ),
        limit_s=550,
    ),
    Job(  # again, in a process of its own: what compiling takes where its results are on the disk
        name="text-to-image-again",
        script="text_to_image.py",
        arguments=("--rounds", "1", "--only", "ours, batch 4"),
        limit_s=150,
    ),
    Job(
        name="text-to-image-blocks",
        script="text_to_image.py",
        arguments=("--rounds", "2", "--only", "ours, batch 4, transformer blocks alone"),
        limit_s=200,
        cold=True,
    ),
)


def run(job: Job, folder: Path) -> str:
    """How it ended."""
    log = folder / f"{job.name}.log"
    command = [sys.executable, str(HERE / job.script), *job.arguments, "--output", str(folder / f"{job.name}.json")]
    began = time.monotonic()
    with log.open("w") as stream, tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment(job, scratch)
        )
        try:
            code = process.wait(timeout=job.limit_s)
            end = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which hold the GPU
            process.wait()
            end = f"out of time ({job.limit_s} s)"
    return f"{job.name}: {end} after {time.monotonic() - began:.0f} s"


def environment(job: Job, scratch: str) -> dict[str, str]:
    """The machine with the GPU may have the folder only."""
    known = os.environ.get("PYTHONPATH")
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *([known] if known else [])])}
    if job.cold:
        found |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
    return found


def main() -> int:
    """Run the jobs; 0 when all were done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=[job.name for job in JOBS])
    parser.add_argument("--lines", type=int, default=14, help="of each log that are shown")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    ended: list[str] = []
    for job in JOBS:
        if args.only and job.name not in args.only:
            continue
        ended.append(run(job, args.folder))
        print(f"== {ended[-1]}", flush=True)
        shown = (args.folder / f"{job.name}.log").read_text(errors="replace").splitlines()[-args.lines :]
        print("\n".join(line[:300] for line in shown), flush=True)
    return int(not all(": done" in line for line in ended))


if __name__ == "__main__":
    sys.exit(main())
