"""A LoRA training step on one GPU, Llama-3.1-8B's shape with random weights: the work of the target table, item by item.

    python benchmarks/gpu_training.py --output ours.json                           # everything
    python benchmarks/gpu_training.py --items one-2x2048 eight-8x512 --output ours.json
    python benchmarks/gpu_training.py --check-only

First the results are compared with PEFT's, a joint pass with single ones and what the items run in besides (gpu_check.py): a
failed check prints no number, writes no file and exits 1. Each item prints a line and is in the file as soon as it is measured.
`ms` is the median over steps by CUDA events around the whole step, optimizer included, the GPU idle before each: what
peers_gpu.py measures. `series_ms` is the wall clock of as many steps that follow each other, divided by their number. Peers:
gpu_peers.py. The table: gpu_table.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_check import check
from gpu_longest import measure_longest
from gpu_model import (
    GIB,
    WARM_UP,
    Bases,
    Shape,
    Training,
    Work,
    at_most,
    free,
    llama,
    peak_gib,
    series,
    spread,
    timed,
    token_rows,
)
from gpu_power import Watch
from gpu_problems import MANY, MIXED_RANKS
from gpu_results import Results

import lorabank as lb

Row = dict[str, Any]

LONG = 2048
"""Tokens of a row of most of what is timed."""
STEPS = {
    "one-2x2048": Work(rows=2, tokens=2048),
    "one-1x512": Work(rows=1, tokens=512),
    "eight-8x512": Work(rows=8, tokens=512, ranks=(16,) * 8),
    "one-4x2048-recompute": Work(rows=4, tokens=2048, recompute=True, offload=True),
    "fp8-2x2048": Work(rows=2, tokens=2048, storage="fp8"),
    "fp8-4x2048": Work(rows=4, tokens=2048, storage="fp8"),
    "nf4-2x2048-recompute": Work(rows=2, tokens=2048, storage="nf4", recompute=True, offload=True, cap_gib=24.0),
}
"""Items that are one training step."""


def measure_step(bases: Bases, work: Work, args: argparse.Namespace) -> Row:
    """One training step: time, memory, start."""
    try:
        with at_most(work.cap_gib):
            return _measure_step(bases, work, args)
    finally:
        if work.cap_gib is not None:
            bases.drop()


def _measure_step(bases: Bases, work: Work, args: argparse.Namespace) -> Row:
    model = bases.get(work.storage)
    torch.cuda.synchronize()
    loaded = peak_gib()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    training = Training(model, work)
    losses = training.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    row: Row = {
        "layers": bases.shape.layers, "adapters": len(work.ranks), "rows": work.rows, "tokens": work.tokens,
        "storage": work.storage, "recompute": work.recompute,
        "offload": work.offload, "kept": work.kept, "borders": work.borders,
        "cap_gib": work.cap_gib, "first_step_s": round(first, 2),
        "load_peak_gib": loaded, "first_step_peak_gib": peak_gib(),
    }  # fmt: skip
    torch.cuda.reset_peak_memory_stats()  # before the pass that is captured: a replay allocates nothing, its pool counts
    for _ in range(WARM_UP - 1):
        training.step()
    times = timed(training.step, args.steps)
    with Watch() as seen:
        series(training.step, args.steps)
    row |= spread(times) | {"series_ms": round(series(training.step, args.steps), 3), "steps": len(times)} | seen.row
    losses = training.step()
    if training.engine.fits.times:
        raise RuntimeError("the step ran out of memory and went through in parts: that isn't the work to be measured")
    tokens, ms = work.rows * work.tokens, row["ms"]
    row |= {
        "tokens_per_s": round(tokens / ms * 1e3),
        "useful_tflops": round(bases.shape.useful_tflop(work.rows, work.tokens) / ms * 1e3, 1),
        "peak_gib": peak_gib(),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "loss": losses[training.names[0]].mean,
        "graph_refused": training.engine.graphs.refused,
    }
    training.close()
    return row


def measure_many(bases: Bases, args: argparse.Namespace) -> Row:
    """Many adapters of mixed ranks beside one of their mean rank, on the same tokens. Fewer blocks: each has its Adam state."""
    ranks = tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(MANY))
    mean = sum(ranks) // MANY
    layers = min(bases.shape.layers, args.many_layers)
    row: Row = {"layers": layers, "adapters": MANY, "rows": MANY, "tokens": 64, "mean_rank": mean}
    for prefix, chosen in (("", ranks), ("one_", (mean,))):
        training = Training(bases.get(layers=layers), Work(rows=MANY, tokens=64, ranks=chosen))
        for _ in range(WARM_UP):
            training.step()
        row |= spread(timed(training.forward_backward, args.steps, after=training.clear), prefix)
        torch.cuda.reset_peak_memory_stats()
        training.step()
        whole = timed(training.step, args.steps)
        row |= spread(whole, f"{prefix}step_") | {f"{prefix}series_ms": round(series(training.step, args.steps), 3)}
        row |= {f"{prefix}peak_gib": peak_gib(), f"{prefix}graph_refused": training.engine.graphs.refused}
        training.close()
        del training
    return row | {"ratio": round(row["ms"] / row["one_ms"], 4), "step_ratio": round(row["step_ms"] / row["one_step_ms"], 4)}


def measure_packed(bases: Bases, args: argparse.Namespace) -> Row:
    """Short examples packed into one row: a step whose pass is replayed as a CUDA graph, beside one kernel by kernel."""
    work = Work(rows=1, tokens=512, packed=8)
    row: Row = {"layers": bases.shape.layers, "adapters": 1, "rows": work.rows, "tokens": work.tokens, "packed": work.packed}
    for prefix, graphs in (("", True), ("uncaptured_", False)):
        training = Training(bases.get(), work, graphs=graphs)
        for _ in range(WARM_UP):
            training.step()
        row |= spread(timed(training.step, args.steps), prefix)
        if graphs and not training.engine.graphs.any:
            raise RuntimeError(f"the pass wasn't captured: {training.engine.graphs.refused or 'nothing says why'}")
        training.close()
        del training
    return row | {"ratio": round(row["ms"] / row["uncaptured_ms"], 4)}


def measure_inference_peak(bases: Bases, args: argparse.Namespace) -> Row:
    """Peak of a training step with recomputation over that of sampling from the bare base: a prefill and a decoding step."""
    model, length = bases.get(), 2048
    ids = token_rows(1, length, bases.shape.vocabulary).to(bases.device)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
    torch.cuda.synchronize()
    inference = peak_gib()
    del out
    free()
    training = Training(model, Work(rows=1, tokens=length, recompute=True))
    training.step()
    torch.cuda.synchronize()
    first = peak_gib()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        training.step()
    torch.cuda.synchronize()
    trained = peak_gib()
    training.close()
    return {
        "layers": bases.shape.layers, "rows": 1, "tokens": length, "peak_gib": trained, "first_step_peak_gib": first,
        "inference_peak_gib": inference, "ratio": round(trained / inference, 4),
    }  # fmt: skip


def measure_merged(bases: Bases, args: argparse.Namespace) -> Row:
    """Forward of the model with an adapter merged into it beside the plain base's, before the merge and after its end."""
    model = bases.get()
    ids = token_rows(2, 2048, bases.shape.vocabulary).to(bases.device)
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=16))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_(std=0.02)
    adapter = bank.adapter("a")
    bank.detach()

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def times() -> list[float]:
        for _ in range(3):
            forward()
        return timed(forward, max(20, args.steps))

    plain = times()
    handle = lb.merge(model, adapter, say=None, force=True)
    merged = times()
    handle.unmerge()
    plain += times()
    row: Row = {"layers": bases.shape.layers, "rows": 2, "tokens": 2048, **spread(merged), **spread(plain, "base_")}
    return row | {"ratio": round(row["ms"] / row["base_ms"], 4)}


def measure_start(bases: Bases, args: argparse.Namespace) -> Row:
    """Seconds from a loaded model to the end of its first step, in a process of its own that finds no compiled code anywhere."""
    bases.drop()
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        line = [sys.executable, __file__, "--start-child", "--layers", str(bases.shape.layers)]
        out = subprocess.run(line, env={**os.environ, **caches}, capture_output=True, text=True, check=False, timeout=300)
    if out.returncode:
        raise RuntimeError(f"the process ended with {out.returncode}: {out.stderr[-2000:]}")
    return {"layers": bases.shape.layers, "rows": 2, "tokens": 2048, "first_step_s": json.loads(out.stdout.splitlines()[-1])}


def start_child(shape: Shape) -> None:
    """The process of `measure_start`."""
    model = llama(shape, torch.device("cuda"))
    torch.cuda.synchronize()
    began = time.perf_counter()
    training = Training(model, STEPS["one-2x2048"])
    training.step()
    torch.cuda.synchronize()
    print(json.dumps(round(time.perf_counter() - began, 2)))


OTHERS: Mapping[str, Callable[[Bases, argparse.Namespace], Row]] = {
    "many-64": measure_many,
    "packed-1x512": measure_packed,
    "inference-peak": measure_inference_peak,
    "merged-forward": measure_merged,
    "longest": measure_longest,
    "start": measure_start,
}
ITEMS = (
    *("one-2x2048", "eight-8x512", "one-1x512", "packed-1x512", "one-4x2048-recompute", "inference-peak", "merged-forward"),
    *("many-64", "fp8-2x2048", "fp8-4x2048", "nf4-2x2048-recompute", "start", "longest"),
)
"""In the order in which they run: items on the same base together, the costly ones last."""


def measure(item: str, bases: Bases, args: argparse.Namespace) -> Row:
    """An item's row."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = (
        measure_step(bases, replace(STEPS[item], kept=args.kept, borders=not args.no_borders), args)
        if item in STEPS
        else OTHERS[item](bases, args)
    )
    return {"item": item, **found}


def describe(row: Row) -> str:
    """An item in one line."""
    parts: list[str] = []
    if "ms" in row:
        parts.append(f"{row['ms']:.1f} ms ({row['ms_min']:.1f} to {row['ms_max']:.1f})")
    for key, text in _SHOWN.items():
        if row.get(key) is not None:
            parts.append(text.format(row[key]))
    return f"{row['item']:22s} {' · '.join(parts)}  [{row['layers']} layers]"


_SHOWN = {
    "series_ms": "series {:.1f} ms",
    "one_ms": "one adapter {:.1f} ms",
    "step_ms": "whole step {:.1f} ms",
    "one_step_ms": "one adapter's {:.1f} ms",
    "base_ms": "base {:.1f} ms",
    "uncaptured_ms": "kernel by kernel {:.1f} ms",
    "ratio": "ratio {:.3f}",
    "step_ratio": "of whole steps {:.3f}",
    "tokens_per_s": "{:,} tok/s",
    "useful_tflops": "{:.0f} useful TFLOP/s",
    "tokens": "{:,} tokens a row",
    "peak_gib": "{:.2f} GiB",
    "inference_peak_gib": "inference {:.2f} GiB",
    "power_w": "{:.0f} W",
    "sm_mhz": "{:.0f} MHz",
    "power_capped": "held back by power {:.0%} of the time",
    "first_step_s": "first step {:.1f} s",
    "graph_refused": "NOT CAPTURED: {}",
}


def run_checks(args: argparse.Namespace, shape: Shape) -> tuple[dict[str, Any], frozenset[str]]:
    """(the record, storages whose own check failed). Exits when our bf16 path is wrong."""
    works = [STEPS[item] for item in args.items if item in STEPS]
    storages = sorted({work.storage for work in works} - {"bf16"})
    offloaded = sorted({work.storage for work in works if work.offload})
    mixed, packed = "many-64" in args.items, "packed-1x512" in args.items
    record: dict[str, Any] = {"passed": True}
    failed: set[str] = set()
    for outcome in check(
        shape, torch.device("cuda"), storages=storages, offloaded=offloaded, mixed=mixed, packed=packed, long=LONG
    ):
        print(outcome, flush=True)
        record[outcome.name] = outcome.record()
        if outcome.passed:
            continue
        if outcome.name not in storages:
            sys.exit("results disagree: no times are taken")
        failed.add(outcome.name)
    free()
    return record, frozenset(failed)


def run_items(bases: Bases, args: argparse.Namespace, results: Results, failed: frozenset[str]) -> int:
    """Measure, print and keep each item; the number of those that gave nothing."""
    missing = 0
    for item in args.items:
        if item in STEPS and STEPS[item].storage in failed:
            print(f"{item:22s} no number: the check of {STEPS[item].storage} failed", flush=True)
            missing += 1
            continue
        try:
            row = measure(item, bases, args)
        except Exception as error:  # noqa: BLE001  the next items may still give their numbers
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"[:500]
        else:
            results.add(row)
            print(describe(row), flush=True)
            continue
        print(f"{item:22s} no number: {failure}", flush=True)
        results.record.setdefault("failures", {})[item] = failure
        results.write()
        missing += 1
        bases.drop()  # the model may be left with adapters in it
    return missing


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--items", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help=f"of {', '.join(ITEMS)}")
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every item")
    made.add_argument("--layers", type=int, default=32, help="blocks of the model; fewer is a quick look, not the table's work")
    made.add_argument(
        "--many-layers", type=int, default=16, help="blocks for many-64, whose 64 adapters and Adam states need room"
    )
    made.add_argument("--kept", choices=("products", "all"), default="products", help="what blocks keep for backward")
    made.add_argument("--no-borders", action="store_true", help="without LoRA in the borders of weights")
    made.add_argument("--steps", type=int, default=8, help="timed steps, at least 8 for the table")
    made.add_argument("--longest-tries", type=int, default=5)
    made.add_argument("--longest-seconds", type=float, default=150.0, help="no further try after so long")
    made.add_argument("--commit", help="what is measured, where the folder isn't a git repository")
    made.add_argument("--check-only", action="store_true")
    made.add_argument("--start-child", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, keep."""
    args = parser().parse_args(arguments)
    args.items = [item for item in ITEMS if item in args.items]
    if not torch.cuda.is_available():
        sys.exit("gpu_training.py needs a GPU; cpu_training.py is for machines without one")
    shape = Shape(layers=args.layers)
    if args.start_child:
        start_child(shape)
        return 0
    record, failed = run_checks(args, shape)
    if args.check_only:
        return int(bool(failed))
    results = Results.start("training", args.output, gpu=torch.cuda.get_device_name(), revision=args.commit, check=record)
    missing = run_items(Bases(shape, torch.device("cuda")), args, results, failed)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
