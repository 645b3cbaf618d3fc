"""What do the ways of combining adapters keep? Two adapters, each trained on a slice of E2E, put together by every method.

    python studies/combining/run.py

Trains the two jointly unless --work holds them already, then measures the validation loss of each slice over the base, each
adapter and each combination. Results go to results/result.json, the table to README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from table import write

import lorabank as lb
from lorabank.data.prepare import prepare
from lorabank.data.render import TokenRow
from lorabank.engine.step import Engine
from lorabank.merging.combine import combine_and_measure
from lorabank.merging.methods import COMBINERS
from lorabank.models.load import LoadedBase, load_base
from lorabank.training.allocation import keep_freed_memory
from lorabank.training.evaluate import spread, validation_losses
from lorabank.training.events import EvalRecord, Notice, RunPlan, RunResult, StepRecord

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SLICES: Mapping[str, range] = {"short": range(3, 6), "long": range(7, 9)}
"""Name → attributes of a meaning representation: a sentence on three to five facts, or on seven and eight."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination."""

    method: str
    weights: tuple[float, float] = (0.5, 0.5)
    options: Mapping[str, Any] = field(default_factory=dict)


def cases(rank: int) -> list[Case]:
    """What is measured, in the order of the table. `rank`: of each adapter."""
    found = [Case(method="exact"), *(Case(method="svd", options={"rank": r}) for r in (rank, rank // 2, rank // 4, 1))]
    found.append(Case(method="svd", options={"energy": 0.9}))
    for density, r in ((0.5, rank), (0.2, rank)):
        found.append(Case(method="magnitude_prune", options={"density": density, "rank": r}))
        found.append(Case(method="dare", options={"density": density, "rank": r}))
        # ties averages those that agree, where the others add up
        found.append(Case(method="ties", weights=(1.0, 1.0), options={"density": density, "rank": r}))
    found.sort(key=lambda case: list(COMBINERS).index(case.method))
    found += [Case(method="exact", weights=(1.0, 1.0)), Case(method="svd", weights=(1.0, 1.0), options={"rank": rank})]
    return found


def slice_rows(file: str, name: str) -> list[dict[str, str]]:
    """The rows of one of E2E's files whose meaning has as many attributes as the slice says."""
    rows = [json.loads(line) for line in (ROOT / "examples" / "data" / file).read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["mr"].count("[") in SLICES[name]]


def data_config(folder: Path, name: str) -> lb.DataConfig:
    """A slice's files, written into `folder`."""
    files = {}
    for part in ("train", "val"):
        files[part] = folder / f"{name}-{part}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in slice_rows(f"e2e_{part}.jsonl", name)]
        files[part].write_text("".join(lines), encoding="utf-8")
    return lb.DataConfig(
        train=str(files["train"]), val=str(files["val"]), prompt="{mr}", completion="{ref}", system="", max_length=256
    )


class Steps:
    """Prints the losses of a run."""

    def on_start(self, plan: RunPlan) -> None:
        print(f"learning rate {plan.adapters[0].learning_rate:g}, {plan.adapters[0].layers} layers", flush=True)

    def on_step(self, record: StepRecord) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {record.adapter} step {record.step}: loss {record.loss:.4f}", flush=True)

    def on_eval(self, record: EvalRecord) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {record.adapter}: validation loss {record.metrics['loss']:.4f}", flush=True)

    def on_notice(self, notice: Notice) -> None:
        print(notice.text, flush=True)

    def on_busy(self, activity: str, done: int, total: int) -> None:
        pass

    def on_end(self, result: RunResult) -> None:
        pass


def train(base: LoadedBase, work: Path, args: argparse.Namespace) -> None:
    """Both adapters, jointly, into `work`."""
    data = {name: data_config(work, name) for name in SLICES}
    run = lb.AdapterRun(rank=args.rank, batch_size=args.batch_size, max_steps=args.steps)
    config = lb.TrainConfig(
        model=args.model,
        data=replace(data["short"], train=None, val=None),
        defaults=run,
        adapters={name: replace(run, data=own.train, val_data=own.val) for name, own in data.items()},
        eval=lb.EvalConfig(every=args.steps, max_rows=args.validation_rows, samples=0, batch_size=16),
        device="cpu",
        threads=args.threads,
    )
    result = lb.train(config, model=base.model, tokenizer=base.tokenizer, listeners=[Steps()])
    if result.interrupted:
        sys.exit(130)
    for name, adapter in result.trained.items():
        adapter.save(work / name)


class Losses:
    """Validation losses of adapters on both slices, over one base."""

    def __init__(self, base: LoadedBase, rows: Mapping[str, Sequence[TokenRow]]) -> None:
        self.bank = lb.attach(base.model)
        self.engine = Engine(self.bank)
        self.rows = rows

    def of(self, adapter: lb.Adapter | None) -> dict[str, float]:
        """By slice; None is the base alone."""
        name = "base" if adapter is None else "case"
        if adapter is not None:
            self.bank.load(name, adapter)
        found = {
            part: validation_losses(self.engine, {name: own}, batch_size=16, busy=lambda activity, done, total: None)[name]
            for part, own in self.rows.items()
        }
        if adapter is not None:
            self.bank.remove(name)
        return found


def measure(base: LoadedBase, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of the base, of each adapter, of every combination, with the report's numbers."""
    rows = {name: spread(prepare(data_config(work, name), base.tokenizer, seed=42).val, args.validation_rows) for name in SLICES}
    losses = Losses(base, rows)
    adapters = {name: lb.Adapter.load(work / name) for name in SLICES}
    document: dict[str, Any] = {"rows": {name: len(own) for name, own in rows.items()}, "alone": {"base": losses.of(None)}}
    for name, adapter in adapters.items():
        document["alone"][name] = losses.of(adapter)
    document["cases"] = []
    for case in cases(args.rank):
        parts = list(zip(adapters.values(), case.weights, strict=True))
        began = time.monotonic()
        combined = combine_and_measure(parts, case.method, **case.options)
        seconds, report = time.monotonic() - began, combined.report
        found = {
            **asdict(case), "seconds": round(seconds, 1), "error": report.error, "ranks": report.ranks,
            "losses": losses.of(combined.adapter),
        }  # fmt: skip
        print(f"{time.strftime('%H:%M:%S')}  {case}: {found['losses']}. {report}", flush=True)
        document["cases"].append(found)
    return document


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> int:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name as in lorabank's settings (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2, help="rows a step of each adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--validation-rows", type=int, default=24, help="of each slice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "combining", help="folder for the rows and the adapters")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    base = load_base(args.model, dtype="fp32", device="cpu")
    if not all((args.work / name / "adapter_model.safetensors").is_file() for name in SLICES):
        train(base, args.work, args)
        print(f"trained in {time.monotonic() - began:.0f} s", flush=True)
        base = load_base(args.model, dtype="fp32", device="cpu")
    settings = {key: value for key, value in vars(args).items() if key not in ("work", "output")}
    document = {
        "settings": settings,
        "versions": {"lorabank": lb.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **measure(base, args.work, args),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
