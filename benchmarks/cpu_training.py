"""Seconds a training step on the CPU: lorabank beside PEFT, on the same model, rows and machine, step by step in turn.

    python benchmarks/cpu_training.py                     # SmolLM2-135M-Instruct, r=16 on all seven linear layers, fp32
    python benchmarks/cpu_training.py --layers 4 --rounds 2   # a quick look

Machines drift, so each system works in a process of its own, in turns, and ratios are taken turn by turn; the median ratio is the
result. Before any time is printed, losses and gradients of both systems are compared: a speed-up over a wrong result is refused.
Ours runs as `lorabank train` does (it keeps freed memory); `--peft-keeps-memory` gives PEFT's process the same setting.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from lorabank.training.allocation import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))
from turns import Worker, keep, ratios, serve

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE = 16, 32, 1e-4
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker does."""

    system: str
    """`lorabank` or `peft`."""
    rows: int
    tokens: int = 128
    adapters: int = 1
    compiled: bool = False
    dora: bool = False
    keeps_memory: bool = False
    """Whether the process reuses freed memory."""


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


def peft_config(*, dora: bool) -> peft.LoraConfig:
    """What PEFT trains."""
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=dora)


def bank_config(*, dora: bool) -> lb.AdapterConfig:
    """What lorabank trains."""
    return lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, use_dora=dora)


def peft_step(model: PreTrainedModel, ids: torch.Tensor, *, compiled: bool = False, dora: bool = False) -> Step:
    """PEFT's usual loop."""
    config = peft_config(dora=dora)
    wrapped = peft.get_peft_model(model.train(), config)
    if compiled:
        wrapped.compile()  # the whole model, as PEFT's users do
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bank_step(model: PreTrainedModel, ids: torch.Tensor, adapters: int, *, compiled: bool, dora: bool = False) -> Step:
    """lorabank with `adapters` slots sharing the rows."""
    if compiled:
        compile_blocks(model)
    bank = lb.attach(model)
    names = [f"adapter{i}" for i in range(adapters)]
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in names:
        bank.add(name, bank_config(dora=dora))
        optimizer.add(name)
    batch = as_batch(ids, names)

    def step() -> None:
        losses = forward_backward(engine, batch)
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: loss.tokens for name, loss in losses.items()})

    return step


def check_equal(folder: Path, layers: int | None, *, dora: bool = False) -> dict[str, float]:
    """Loss and gradients of one adapter on both systems, from the same values. Exits when they disagree."""
    ids = token_rows(2, 64)
    ours = load(folder, layers)
    bank = lb.attach(ours)
    bank.add("a", bank_config(dora=dora))
    with torch.no_grad():
        for key, p in bank.named_parameters("a"):
            if not key.endswith(".magnitude"):
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    loss = forward_backward(Engine(bank), as_batch(ids, ["a"]))["a"]
    wrapped = peft.get_peft_model(load(folder, layers).eval(), peft_config(dora=dora))
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapter = bank.adapter("a")
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs[f"base_model.model.{path}.lora_A.default.weight"].copy_(layer.A)
            theirs[f"base_model.model.{path}.lora_B.default.weight"].copy_(layer.B)
            if layer.magnitude is not None:
                theirs[f"base_model.model.{path}.lora_magnitude_vector.default.weight"].copy_(layer.magnitude)
    reference = wrapped(input_ids=ids, labels=ids).loss
    reference.backward()
    worst = 0.0
    for name, p in bank.named_parameters("a"):
        path, _, role = name.rpartition(".")
        kind = "magnitude_vector" if role == "magnitude" else role
        other = theirs[f"base_model.model.{path}.lora_{kind}.default.weight"].grad
        assert p.grad is not None and other is not None
        mine = p.grad / loss.tokens
        worst = max(worst, float((mine - (other.t() if role == "B" else other)).norm() / other.norm()))
    difference = abs(loss.mean - float(reference))
    if difference > 1e-4 or worst > 1e-3:
        sys.exit(f"results disagree (loss by {difference:.2e}, a gradient by {worst:.2e} of its norm): no times are printed")
    return {"loss_difference": difference, "largest_gradient_difference": worst}


def run_worker(work: Work, folder: Path, layers: int | None) -> None:
    """The worker's process."""
    if work.keeps_memory:
        keep_freed_memory()
    model, ids = load(folder, layers), token_rows(work.rows, work.tokens)
    if work.system == "peft":
        serve(peft_step(model, ids, compiled=work.compiled, dora=work.dora))
    else:
        serve(bank_step(model, ids, work.adapters, compiled=work.compiled, dora=work.dora))


def compare(name: str, mine: Work, other: Work, repeats: int, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One line of the table: a step of ours beside `repeats` steps of the other, in turn."""
    workers = [Worker(_command(work, args, folder)) for work in (mine, other)]
    found = ratios(*workers, repeats=repeats, rounds=args.rounds)
    peaks = [round(worker.peak_gib(), 2) for worker in workers]
    for worker in workers:
        worker.end()
    result = {"work": name, **found.record(), "peak_gib": peaks}
    spread = f"({min(found.each):.2f} to {max(found.each):.2f})"
    print(
        f"{name:58s} {result['ours_s']:8.2f} s {result['other_s']:8.2f} s   {result['ratio']:.2f} × {spread}   "
        f"{peaks[0]:.2f} | {peaks[1]:.2f} GiB",
        flush=True,
    )
    return result


def _command(work: Work, args: argparse.Namespace, folder: Path) -> list[str]:
    line = [
        sys.executable,
        __file__,
        "--model",
        str(folder),
        "--threads",
        str(args.threads),
        "--worker",
        json.dumps(asdict(work)),
    ]
    return line + (["--layers", str(args.layers)] if args.layers else [])


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
    parser.add_argument("--dora", action="store_true", help="steps with DoRA, beside PEFT's and beside plain LoRA")
    parser.add_argument("--only", default="", help="only the lines whose name holds this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peft-keeps-memory", action="store_true", help="PEFT's process reuses freed memory too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = locate(args.model)
    if args.worker:
        run_worker(Work(**json.loads(args.worker)), folder, args.layers)
        return
    check = check_equal(folder, args.layers)
    decomposed = check_equal(folder, args.layers, dora=True) if args.dora else {}
    loss, gradient = check["loss_difference"], check["largest_gradient_difference"]
    print(f"same loss (to {loss:.1e}) and gradients (to {gradient:.1e} of their norm) as PEFT")
    print(f"{'':58s} {'lorabank':>10s} {'other':>10s}   lorabank / other          peak memory")
    rows: list[dict[str, object]] = []

    def ours(rows: int, adapters: int, compiled: bool = False) -> Work:
        return Work(system="lorabank", rows=rows, adapters=adapters, compiled=compiled, keeps_memory=True)

    def theirs(rows: int, compiled: bool = False) -> Work:
        return Work(system="peft", rows=rows, compiled=compiled, keeps_memory=args.peft_keeps_memory)

    def line(name: str, mine: Work, other: Work, repeats: int = 1) -> None:
        if args.only in name:
            rows.append(compare(name, mine, other, repeats, args, folder))

    line("one adapter, 4 × 128 tokens (PEFT)", ours(4, 1), theirs(4))
    line("eight adapters, 1 × 128 each (eight PEFT steps)", ours(8, 8), theirs(1), 8)
    line("eight slots, 8 × 128 tokens (one slot)", ours(8, 8), ours(8, 1))
    if args.dora:
        dora = [Work(system=system, rows=4, dora=True, keeps_memory=system == "lorabank") for system in ("lorabank", "peft")]
        line("DoRA, 4 × 128 tokens (PEFT's DoRA)", *dora)
        line("DoRA, 4 × 128 tokens (plain LoRA)", dora[0], ours(4, 1))
        line("PEFT's DoRA, 4 × 128 tokens (PEFT's plain LoRA)", dora[1], theirs(4))
    if args.compile:
        line("one adapter, 4 × 128, compiled (PEFT)", ours(4, 1, True), theirs(4))
        line("one adapter, 4 × 128, compiled (PEFT compiled)", ours(4, 1, True), theirs(4, True))
        line("eight adapters, 1 × 128 each, compiled (eight PEFT steps)", ours(8, 8, True), theirs(1), 8)
        line("eight adapters, compiled (eight steps, PEFT compiled)", ours(8, 8, True), theirs(1, True), 8)
        line("eight slots, compiled (one slot, compiled)", ours(8, 8, True), ours(8, 1, True))
    record = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "model": args.model, "layers": args.layers, "rounds": args.rounds,
        "peft_keeps_memory": args.peft_keeps_memory, "check": check, "check_dora": decomposed, "rows": rows,
    }  # fmt: skip
    keep(record, args.output)


if __name__ == "__main__":
    main()
