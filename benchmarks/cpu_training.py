"""Seconds a training step on the CPU: lorabank beside PEFT, on the same model, rows and machine, step by step in turn.

    python benchmarks/cpu_training.py                     # SmolLM2-135M-Instruct, r=16 on all seven linear layers, fp32
    python benchmarks/cpu_training.py --layers 4 --rounds 2   # a quick look

Machines drift, so steps of the systems alternate and ratios are taken round by round; the median ratio is the result. Before any
time is printed, losses and gradients of both systems are compared: a speed-up over a wrong result is refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorabank as lb
from lorabank.engine.batch import Batch, make_batch
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.models.load import locate
from lorabank.optim.slot_optimizer import SlotOptimizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE = 16, 32, 1e-4
Step = Callable[[], None]


def load(folder: Path, layers: int | None) -> PreTrainedModel:
    """The base, fp32, cut to its first `layers` blocks when asked."""
    extra = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)


def token_rows(rows: int, tokens: int) -> torch.Tensor:
    """Random token ids, the same for both systems."""
    return torch.randint(0, 40000, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))


def as_batch(ids: torch.Tensor, names: list[str]) -> Batch:
    """All tokens trained; consecutive rows share an adapter."""
    count, length = ids.shape
    return make_batch([(row.tolist(), [1.0] * length) for row in ids], [names[i * len(names) // count] for i in range(count)])


def peft_step(model: PreTrainedModel, ids: torch.Tensor, *, compiled: bool = False) -> Step:
    """PEFT's usual loop."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model.train(), config)
    if compiled:
        wrapped.compile()  # the whole model, as PEFT's users do
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bank_step(model: PreTrainedModel, ids: torch.Tensor, adapters: int, *, compiled: bool) -> Step:
    """lorabank with `adapters` slots sharing the rows."""
    if compiled:
        compile_blocks(model)
    bank = lb.attach(model)
    names = [f"adapter{i}" for i in range(adapters)]
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in names:
        bank.add(name, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS))
        optimizer.add(name)
    batch = as_batch(ids, names)

    def step() -> None:
        losses = forward_backward(engine, batch)
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: loss.tokens for name, loss in losses.items()})

    return step


def check_equal(folder: Path, layers: int | None) -> dict[str, float]:
    """Loss and gradients of one adapter on both systems, from the same A and B. Exits when they disagree."""
    ids = token_rows(2, 64)
    ours = load(folder, layers)
    bank = lb.attach(ours)
    bank.add("a", lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS))
    with torch.no_grad():
        for p in bank.parameters("a"):
            p.normal_(std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    loss = forward_backward(Engine(bank), as_batch(ids, ["a"]))["a"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(load(folder, layers).eval(), config)
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapter = bank.adapter("a")
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs[f"base_model.model.{path}.lora_A.default.weight"].copy_(layer.A)
            theirs[f"base_model.model.{path}.lora_B.default.weight"].copy_(layer.B)
    reference = wrapped(input_ids=ids, labels=ids).loss
    reference.backward()
    worst = 0.0
    for name, p in bank.named_parameters("a"):
        path, _, role = name.rpartition(".")
        other = theirs[f"base_model.model.{path}.lora_{role}.default.weight"].grad
        assert p.grad is not None and other is not None
        mine = p.grad / loss.tokens
        worst = max(worst, float((mine - (other.t() if role == "B" else other)).norm() / other.norm()))
    difference = abs(loss.mean - float(reference))
    if difference > 1e-4 or worst > 1e-3:
        sys.exit(f"results disagree (loss by {difference:.2e}, a gradient by {worst:.2e} of its norm): no times are printed")
    return {"loss_difference": difference, "largest_gradient_difference": worst}


def compare(name: str, mine: Step, other: Step, repeats: int, rounds: int) -> dict[str, object]:
    """One line of the table: a step of ours beside `repeats` steps of the other, in turn, after two of each to warm up."""
    for _ in range(2):
        mine()
        other()
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        mine()
        between = time.perf_counter()
        for _ in range(repeats):
            other()
        times.append((between - began, time.perf_counter() - between))
    ratios = [a / b for a, b in times]
    result: dict[str, object] = {
        "work": name,
        "ours_s": round(statistics.median(a for a, _ in times), 3),
        "other_s": round(statistics.median(b for _, b in times), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:58s} {result['ours_s']:8.2f} s {result['other_s']:8.2f} s   {result['ratio']:.2f} × {spread}", flush=True)
    gc.collect()
    return result


def peak_memory(folder: Path, layers: int | None, system: str) -> float:
    """GiB: the largest resident set of a fresh process that makes three steps of 4 × 128."""
    line = [sys.executable, __file__, "--model", str(folder), "--memory-of", system]
    out = subprocess.run(line + (["--layers", str(layers)] if layers else []), capture_output=True, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])


def run_for_memory(folder: Path, layers: int | None, system: str) -> None:
    """Three steps, then this process's own peak."""
    model, ids = load(folder, layers), token_rows(4, 128)
    step = peft_step(model, ids) if system == "peft" else bank_step(model, ids, 1, compiled=False)
    for _ in range(3):
        step()
    # not getrusage: a child inherits its parent's peak there
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 2**20)


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it."""
    out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor, as the system calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor()


def main() -> None:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, help="use only the first blocks")
    parser.add_argument("--compile", action="store_true", help="compiled steps too (needs a C++ compiler)")
    parser.add_argument("--only", default="", help="only the lines whose name holds this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=["peft", "lorabank"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = locate(args.model)
    if args.memory_of:
        run_for_memory(folder, args.layers, args.memory_of)
        return
    check = check_equal(folder, args.layers)
    loss, gradient = check["loss_difference"], check["largest_gradient_difference"]
    print(f"same loss (to {loss:.1e}) and gradients (to {gradient:.1e} of their norm) as PEFT")
    print(f"{'':58s} {'lorabank':>10s} {'other':>10s}   lorabank / other")
    four, one, eight = token_rows(4, 128), token_rows(1, 128), token_rows(8, 128)

    def ours(ids: torch.Tensor, adapters: int, compiled: bool = False) -> Step:
        return bank_step(load(folder, args.layers), ids, adapters, compiled=compiled)

    def theirs(ids: torch.Tensor, compiled: bool = False) -> Step:
        return peft_step(load(folder, args.layers), ids, compiled=compiled)

    rows: list[dict[str, object]] = []

    def line(name: str, mine: Callable[[], Step], other: Callable[[], Step], repeats: int = 1) -> None:
        if args.only in name:
            rows.append(compare(name, mine(), other(), repeats, args.rounds))

    line("one adapter, 4 × 128 tokens (PEFT)", lambda: ours(four, 1), lambda: theirs(four))
    line("eight adapters, 1 × 128 each (eight PEFT steps)", lambda: ours(eight, 8), lambda: theirs(one), 8)
    line("eight slots, 8 × 128 tokens (one slot)", lambda: ours(eight, 8), lambda: ours(eight, 1))
    if args.compile:
        line("one adapter, 4 × 128, compiled (PEFT)", lambda: ours(four, 1, True), lambda: theirs(four))
        line("one adapter, 4 × 128, compiled (PEFT compiled)", lambda: ours(four, 1, True), lambda: theirs(four, True))
        line("eight adapters, 1 × 128 each, compiled (eight PEFT steps)", lambda: ours(eight, 8, True), lambda: theirs(one), 8)
        line("eight adapters, compiled (eight steps, PEFT compiled)", lambda: ours(eight, 8, True), lambda: theirs(one, True), 8)
        line("eight slots, compiled (one slot, compiled)", lambda: ours(eight, 8, True), lambda: ours(eight, 1, True))
    memory = {name: round(peak_memory(folder, args.layers, name), 2) for name in ("lorabank", "peft")}
    print(f"peak memory of the process, 4 × 128: lorabank {memory['lorabank']:.2f} GiB, PEFT {memory['peft']:.2f} GiB")
    record = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "model": args.model, "layers": args.layers, "rounds": args.rounds,
        "check": check, "rows": rows, "peak_gib": memory,
    }  # fmt: skip
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
