"""Does an adapter learn as well over an fp8 or nf4 base as over bf16? Trains the same adapters over each storage and compares.

    python studies/base_storage/run.py
    python studies/base_storage/run.py --device cuda --seeds 1 2 3 4 5 6 7 8 --output studies/base_storage/results/gpu

One run a storage; its seeds are adapters trained jointly over one base. What is there already is kept: `--storages nf4` measures
one anew. Results go to results/result.json, the curves to results/loss.png. On a CPU fp8 units are emulated (see README.md), on a
GPU they are its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from report import write

import lorabank as lb
from lorabank.data.render import TokenRow
from lorabank.engine.step import Engine
from lorabank.models.load import load_base
from lorabank.tasks.text_generation import read_rows
from lorabank.training.allocation import keep_freed_memory
from lorabank.training.evaluate import spread, validation_losses
from lorabank.training.events import EvalRecord, Notice, RunPlan, RunResult, StepRecord

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Storage:
    """A way to keep the frozen base."""

    dtype: str
    """Of the model before its linear layers are quantised."""
    quantised: str | None = None
    emulate: bool = False
    """fp8 with the arithmetic of a GPU's fp8 units."""


STORAGES: Mapping[str, Storage] = {
    "bf16": Storage("bf16"),
    "fp8": Storage("bf16", "fp8", emulate=True),
    "nf4": Storage("bf16", "nf4"),
    "fp8-weight-only": Storage("bf16", "fp8"),
    "fp32": Storage("fp32"),
}
"""In the order of measuring. `fp8`: what a GPU with fp8 units computes; `fp8-weight-only`: what lorabank does on a CPU."""


class Curves:
    """Keeps what a run tells; prints the evaluations."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.plan: RunPlan | None = None
        self.base_loss = float("nan")
        self.seeds: dict[str, dict[str, Any]] = {str(seed): {"train": [], "steps": [], "validation": []} for seed in seeds}

    def on_start(self, plan: RunPlan) -> None:
        self.plan = plan

    def on_step(self, record: StepRecord) -> None:
        self.seeds[record.adapter.removeprefix("seed-")]["train"].append(round(record.loss, 5))

    def on_eval(self, record: EvalRecord) -> None:
        loss = record.metrics["loss"]
        print(f"{time.strftime('%H:%M:%S')}  {record.adapter} step {record.step}: validation loss {loss:.5f}", flush=True)
        if not record.adapter.startswith("seed-"):
            self.base_loss = loss
            return
        own = self.seeds[record.adapter.removeprefix("seed-")]
        own["steps"].append(record.step)
        own["validation"].append(loss)

    def on_notice(self, notice: Notice) -> None:
        if notice.level == "warning":
            print(notice.text, flush=True)

    def on_busy(self, activity: str, done: int, total: int) -> None:
        pass

    def on_end(self, result: RunResult) -> None:
        pass


@dataclass(frozen=True)
class Settings:
    """What all storages share. Results of other settings aren't mixed."""

    model: str
    data: str
    steps: int
    every: int
    batch_size: int
    rank: int
    validation_rows: int
    learning_rate: float | str
    seeds: tuple[int, ...] = (1, 2)
    """Of initialisation and data order: an adapter each."""
    device: str = "cpu"

    def config(self) -> lb.TrainConfig:
        """The run, but for its base."""
        folder = ROOT / self.data
        run = lb.AdapterRun(
            rank=self.rank, learning_rate=self.learning_rate, batch_size=self.batch_size, max_steps=self.steps,
        )  # fmt: skip
        return lb.TrainConfig(
            model=self.model,
            data=lb.DataConfig(
                train=str(folder / "e2e_train.jsonl"),
                val=str(folder / "e2e_val.jsonl"),
                prompt="{mr}",
                completion="{ref}",
                system="",  # the template would put its own sentence before each row
                max_length=256,
            ),
            defaults=run,
            adapters={f"seed-{seed}": replace(run, seed=seed) for seed in self.seeds},
            eval=lb.EvalConfig(every=self.every, max_rows=self.validation_rows, samples=0, batch_size=16),
            device=self.device,
            threads=torch.get_num_threads(),
        )


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Train over one storage, then merge into the bf16 base: curves, final losses, what `merge` says."""
    storage, config = STORAGES[name], settings.config()
    base = load_base(settings.model, dtype=storage.dtype, device=settings.device)
    if storage.quantised is not None:
        emulate = storage.emulate and settings.device == "cpu"
        print(lb.quantize_base(base.model, storage.quantised, emulate=emulate, say=lambda line: None), flush=True)
    curves, began = Curves(settings.seeds), time.monotonic()
    result = lb.train(config, model=base.model, tokenizer=base.tokenizer, listeners=[curves])
    if result.interrupted:
        sys.exit(130)
    seconds = time.monotonic() - began
    rows = spread(read_rows(config, base.tokenizer).by_adapter[f"seed-{settings.seeds[0]}"].val, settings.validation_rows)
    assert curves.plan is not None
    for own in curves.seeds.values():
        own["final"] = own["validation"][-1]
    run: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "training_seconds": round(seconds),
        "learning_rate": curves.plan.adapters[0].learning_rate,
        "layers": curves.plan.adapters[0].layers,
        "base_loss": curves.base_loss,
        "seeds": curves.seeds,
    }
    seed = str(settings.seeds[0])
    adapter = result.trained[f"seed-{seed}"]
    if storage.quantised is not None:
        run["merged_into_itself"] = str(lb.merge(base.model, adapter, say=None).report)
    step = result.adapters[f"seed-{seed}"].best_step
    run["merged_into_bf16"] = {"seed": seed, "step": step} | merged(settings, adapter, rows)
    return run


def merged(settings: Settings, adapter: lb.Adapter, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Validation loss of the bf16 base with the adapter merged in, and the errors that `merge` states."""
    model = load_base(settings.model, dtype="bf16", device=settings.device).model
    report = lb.merge(model, adapter, say=None).report
    engine = Engine(lb.attach(model))
    loss = validation_losses(engine, {"base": rows}, batch_size=16, busy=lambda activity, done, total: None)["base"]
    print(f"{time.strftime('%H:%M:%S')}  merged: validation loss {loss:.5f}. {report}", flush=True)
    return {
        "validation": loss,
        "lost_share": report.lost_share,
        "relative_change": report.relative_change,
        "base_error": report.base_error,
        "said": str(report),
    }


def versions() -> dict[str, str]:
    """Of the packages that compute here, those that are installed."""
    found = {}
    for package in ("torch", "transformers", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it."""
    out = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return out or "unknown"


def cpu_name() -> str:
    """The processor, as the system calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    """Measure, write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, help="measure these anew (default: those without a result)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name as in lorabank's settings (default %(default)s)")
    parser.add_argument("--data", default="examples/data", help="folder with e2e_train.jsonl and e2e_val.jsonl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--batch-size", type=int, default=2, help="rows a step of each seed")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--learning-rate", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="an adapter each, trained jointly")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; fp8-weight-only is for a CPU")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds: each is an adapter of its own, so none may come twice, got {args.seeds}")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="merge: .* of the adapter's change was lost")
    rate = args.learning_rate if args.learning_rate == "auto" else float(args.learning_rate)
    settings = Settings(
        args.model, args.data, args.steps, args.every, args.batch_size, args.rank, args.validation_rows, rate,
        tuple(args.seeds), args.device,
    )  # fmt: skip
    shared = json.loads(json.dumps(settings.__dict__))
    path: Path = args.output / "result.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": shared, "runs": {}}
    document["settings"].setdefault("device", "cpu")
    if document["settings"] != shared:
        sys.exit(f"{path} holds results of other settings, {document['settings']}: give another --output, or delete it")
    usual = [name for name in STORAGES if args.device == "cpu" or name != "fp8-weight-only"]  # the same as fp8 on a GPU
    names = args.storages or [name for name in usual if name not in document["runs"]]
    args.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
        document["runs"][name] = measure(name, settings)
        document["machine"] = {"cpu": cpu_name(), "threads": args.threads, "system": platform.platform()}
        if args.device != "cpu":
            document["machine"]["gpu"] = torch.cuda.get_device_name(args.device)
        document["versions"] = {"lorabank": lb.__version__, "python": platform.python_version()} | versions()
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
