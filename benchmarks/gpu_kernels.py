"""The hot kernels, shape by shape, beside a copy of the same bytes; the frozen products beside torch's own.

    python benchmarks/gpu_kernels.py --output kernels.json

Every kernel is held to kernels/reference.py (AdamW to torch's) first; one that is wrong ends the run without a number. Each
timing starts with a cold L2 cache: a fill of 256 MiB runs right before the kernel and its own time is taken off. The GPU is
kept busy beforehand, so that the host has started everything by then. `fraction`: the copy's time over the kernel's, both
moving the bytes that the kernel can't avoid.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine with the GPU may have the folder only
sys.path.insert(0, str(Path(__file__).parent))

import gpu_bordered
import torch
from gpu_results import Results
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels import reference
from lorabank.kernels.gpu import adamw, lora, loss, siblings
from lorabank.kernels.gpu.border_writing import border_width
from lorabank.kernels.gpu.storage import STORAGES
from lorabank.kernels.segments import Segment
from lorabank.kernels.tables import RouteTables, route_tables

TOKENS = 4096
PAIRS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
RANKS = (16, 64)
SIBLINGS = (2, 3)
"""Gate and up; queries, keys and values."""
MLP_RANK = 16
HIDDEN, VOCABULARY, CHUNK = 4096, 128256, 1024
SCALING = 2.0
TOLERANCE = 1e-2
"""Relative norm: x·Aᵀ·Bᵀ is rounded to bf16 four times on its way (A, the narrow product, B, the result), by 2⁻⁹ at most each."""
FLUSH_NUMBERS = 2**26
BUSY_CYCLES = 4_000_000
"""About 2 ms of a GPU, longer than the host needs to start any of these."""


class Clock:
    """Microseconds with a cold L2 cache."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._flush = torch.empty(FLUSH_NUMBERS, device="cuda")
        self._alone = self._median(lambda: None)

    def _median(self, work: Callable[[], Any]) -> float:
        times: list[float] = []
        for i in range(self.repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            self._flush.zero_()
            work()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def us(self, work: Callable[[], Any]) -> float:
        """What `work` takes on the GPU."""
        return max(self._median(work) - self._alone, 1e-3)

    def copy_us(self, moved: int) -> float:
        """A copy that reads and writes `moved` bytes together."""
        source = torch.empty(moved // 4, device="cuda", dtype=torch.int16)
        target = torch.empty_like(source)
        return self.us(lambda: target.copy_(source))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One timing."""

    kernel: str
    shape: str
    rank: int | str
    work: Callable[[], Any]
    moved: int | None = None
    """Bytes that it reads and writes at least."""
    beside: Callable[[], Any] | None = None
    """What it is compared with, where that isn't a copy."""
    flop: int = 0

    def measure(self, clock: Clock) -> dict[str, Any]:
        """Its row."""
        us = clock.us(self.work)
        assert (self.moved is None) != (self.beside is None)
        other = clock.us(self.beside) if self.beside is not None else clock.copy_us(self.moved or 0)
        row: dict[str, Any] = {"kernel": self.kernel, "shape": self.shape, "rank": self.rank}
        row |= {"us": round(us, 2), "beside_us": round(other, 2), "fraction": round(other / us, 4)}
        if self.moved is not None:
            row |= {"moved_bytes": self.moved, "gb_per_s": round(self.moved / us / 1e3)}
        return row | ({"tflops": round(self.flop / us / 1e6, 1)} if self.flop else {})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer's call: `slots` adapters of one rank share the tokens evenly."""

    inputs: int
    outputs: int
    rank: int
    slots: int
    x: Tensor
    dy: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    scaling: Tensor
    tables: RouteTables

    @classmethod
    def make(cls, inputs: int, outputs: int, rank: int, slots: int, device: torch.device, tokens: int = TOKENS) -> Problem:
        """Random x, dy, A and B."""
        torch.manual_seed(inputs + outputs + rank)
        units = max(2, slots)
        share = units // slots
        rows = {slot: range(slot * share, (slot + 1) * share) for slot in range(slots)}
        bf16 = {"device": device, "dtype": torch.bfloat16}
        return cls(
            inputs=inputs, outputs=outputs, rank=rank, slots=slots,
            x=torch.randn(tokens, inputs, **bf16), dy=torch.randn(tokens, outputs, **bf16),
            A=torch.randn(slots * rank, inputs, device=device) / inputs**0.5, B=torch.randn(slots * rank, outputs, device=device),
            ranks=torch.tensor([[slot * rank, rank] for slot in range(slots)], dtype=torch.int32, device=device),
            scaling=torch.full((slots,), SCALING, device=device),
            tables=route_tables(rows, units, tokens // units, slots).to(device),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Of the narrow tensors."""
        return table_width(self.rank)

    def products(self) -> dict[str, Tensor]:
        """Change of y, of dx, and the gradients of A and B, by the kernels."""
        xa = lora.shrink(self.x, self.A, self.tables, self.ranks, self.scaling, self.width)
        (dB,), (dxa,) = lora.outer_and_shrink([xa], [self.dy], [self.B], self.tables, [self.ranks], [self.scaling])
        added = torch.zeros_like(self.dy)
        lora.expand_(added, xa, self.B, self.tables, self.ranks)
        return {
            "shrink, change": lora.change(xa, self.B, None, self.tables, self.ranks),
            "expand_": added,
            "outer_and_shrink, change": lora.change(dxa, self.A, None, self.tables, self.ranks),
            "outer": lora.outer(dxa, self.x, self.A, self.tables, self.ranks),
            "outer_and_shrink": dB,
        }

    def expected(self) -> dict[str, Tensor]:
        """The same by reference.py and autograd, in fp32."""
        x, A, B = (value.detach().float().requires_grad_() for value in (self.x, self.A, self.B))
        each = len(x) // self.slots
        y = torch.cat([self._delta(x, A, B, slot, each) for slot in range(self.slots)])
        y.backward(self.dy.float())
        assert x.grad is not None and A.grad is not None and B.grad is not None
        found = {"shrink, change": y.detach(), "expand_": y.detach(), "outer_and_shrink, change": x.grad}
        return found | {"outer": A.grad, "outer_and_shrink": B.grad}

    def _delta(self, x: Tensor, A: Tensor, B: Tensor, slot: int, each: int) -> Tensor:
        mine = slice(slot * self.rank, (slot + 1) * self.rank)
        segment = Segment(rows=slice(0, 1), A_RI=A[mine], B_RO=B[mine], scaling=SCALING)
        return reference.lora_delta(x[slot * each : (slot + 1) * each][None], segment)[0]


def disagreements(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> list[str]:
    """What differs by more than rounding explains."""
    wrong: list[str] = []
    for name, value in expected.items():
        off = float((found[name].float() - value).norm() / value.norm())
        if not off <= TOLERANCE:  # NaN too
            wrong.append(f"{name} at {where}: off by {off:.2e} of its norm")
    return wrong


def lora_kernels(p: Problem) -> Iterator[Kernel]:
    """The products of one layer's forward and backward."""
    T, I, O = len(p.x), p.inputs, p.outputs  # noqa: E741
    narrow, a_bytes, b_bytes = 2 * T * p.width, 4 * p.slots * p.rank * I, 4 * p.slots * p.rank * O
    xa = lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width)
    y = torch.randn_like(p.dy)
    shape = f"{I}→{O}" + (f", {p.slots} slots" if p.slots > 1 else "")
    call: dict[str, Any] = {"shape": shape, "rank": p.rank}
    yield Kernel(
        kernel="shrink", work=lambda: lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width),
        moved=2 * T * I + a_bytes + narrow, **call,
    )  # fmt: skip
    yield Kernel(
        kernel="change", work=lambda: lora.change(xa, p.B, None, p.tables, p.ranks), moved=narrow + b_bytes + 2 * T * O, **call
    )
    yield Kernel(
        kernel="expand_", work=lambda: lora.expand_(y, xa, p.B, p.tables, p.ranks), moved=narrow + b_bytes + 4 * T * O, **call
    )
    yield Kernel(
        kernel="outer", work=lambda: lora.outer(xa, p.x, p.A, p.tables, p.ranks), moved=narrow + 2 * T * I + a_bytes, **call
    )
    yield Kernel(
        kernel="outer_and_shrink", moved=2 * narrow + 2 * T * O + 2 * b_bytes,
        work=lambda: lora.outer_and_shrink([xa], [p.dy], [p.B], p.tables, [p.ranks], [p.scaling]), **call,
    )  # fmt: skip


def sibling_case(count: int, rank: int, slots: int, device: torch.device) -> tuple[list[str], list[Kernel]]:
    """What layers that read the same x share; held to the same products one layer after the other."""
    p = Problem.make(HIDDEN, HIDDEN, rank, slots, device)
    weights = [torch.randn_like(p.A) / HIDDEN**0.5 for _ in range(count)]
    ranks, scalings = [p.ranks] * count, [p.scaling] * count
    narrow = [lora.shrink(p.x, weight, p.tables, p.ranks, p.scaling, p.width) for weight in weights]
    alone = {
        "shrink": torch.cat(narrow),
        "change": torch.stack([lora.change(n, w, None, p.tables, p.ranks) for n, w in zip(narrow, weights, strict=True)]).sum(0),
        "outer": torch.cat([lora.outer(n, p.x, p.A, p.tables, p.ranks) for n in narrow]),
    }
    calls: dict[str, Callable[[], Any]] = {
        "shrink": lambda: siblings.shrink(p.x, weights, p.tables, ranks, scalings, p.width),
        "change": lambda: siblings.change(narrow, weights, p.tables, ranks),
        "outer": lambda: siblings.outer(narrow, p.x, weights, p.tables, ranks),
    }
    found = {"shrink": torch.cat(calls["shrink"]()), "change": calls["change"](), "outer": torch.cat(calls["outer"]())}
    kept = {name: (_written(value, p), _written(found[name], p)) for name, value in alone.items()}
    wrong = disagreements(
        {name: mine for name, (_, mine) in kept.items()},
        {name: value.float() for name, (value, _) in kept.items()},
        f"{count} siblings, r {rank}, {slots} slots",
    )
    moved = 2 * len(p.x) * HIDDEN + count * (2 * len(p.x) * p.width + 4 * slots * rank * HIDDEN)
    shape = f"{HIDDEN}, {count} siblings" + (f", {slots} slots" if slots > 1 else "")
    return wrong, [Kernel(kernel=name, shape=shape, rank=rank, work=work, moved=moved) for name, work in calls.items()]


def _written(value: Tensor, p: Problem) -> Tensor:
    """Without columns of ranks that no slot has: they stay unwritten."""
    return value[:, : p.rank] if value.shape[1] == p.width else value


def base_kernels(inputs: int, outputs: int, device: torch.device) -> Iterator[Kernel]:
    """The frozen products, added in place to a tensor that exists, beside torch's plain ones."""
    x, dy = (torch.randn(TOKENS, n, device=device, dtype=torch.bfloat16) for n in (inputs, outputs))
    W = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    kind = STORAGES["linear"]
    assert kind.add_forward is not None and kind.add_input_grad is not None
    forward, backward = kind.add_forward, kind.add_input_grad
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    call: dict[str, Any] = {"shape": f"{inputs}→{outputs}", "rank": "–", "flop": 2 * TOKENS * inputs * outputs}
    yield Kernel(kernel="frozen product", work=lambda: forward(y, x, [W]), beside=lambda: torch.mm(x, W.t()), **call)
    yield Kernel(kernel="frozen input gradient", work=lambda: backward(dx, dy, [W]), beside=lambda: torch.mm(dy, W), **call)


def softmax_case(tokens: int, vocabulary: int, device: torch.device) -> tuple[list[str], Kernel]:
    """The loss over a chunk of logits: read once, its gradient written over them."""
    torch.manual_seed(0)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    hidden, weight = torch.randn(64, 32, device=device), torch.randn(vocabulary, 32, device=device) * 0.3
    logits = (hidden @ weight.t()).to(torch.bfloat16)
    exact = logits.float().requires_grad_()  # the identity as the head: reference.py then sees the very logits
    logprobs = exact.log_softmax(-1).gather(1, targets[:64, None]).squeeze(1)
    (-logprobs).sum().backward()
    assert exact.grad is not None
    plain = reference.token_logprobs(hidden, weight, targets[:64])
    found = {"logprobs": loss.softmax_(logits, targets[:64], torch.ones(64, device=device)), "gradient": logits}
    wrong = disagreements(found, {"logprobs": logprobs.detach(), "gradient": exact.grad}, "softmax")
    wrong += disagreements({"logprobs": found["logprobs"]}, {"logprobs": plain}, "softmax, against reference.py")
    many = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16)
    weights = torch.ones(tokens, device=device)
    kernel = Kernel(
        kernel="softmax", shape=f"{tokens} × {vocabulary}", rank="–", work=lambda: loss.softmax_(many, targets, weights),
        moved=4 * tokens * vocabulary,
    )  # fmt: skip
    return wrong, kernel


def adamw_case(sizes: Sequence[int], rank: int, device: torch.device) -> tuple[list[str], Kernel]:
    """One adapter's step. The gradient is read twice, since clipping needs its norm first: 32 bytes a number."""
    torch.manual_seed(0)
    leaves = [torch.randn(n, device=device) for n in sizes]
    gradients = [torch.randn(n, device=device) for n in sizes]
    first, second = (torch.zeros(sum(sizes), device=device) for _ in range(2))
    count = torch.zeros(1, dtype=torch.int64, device=device)
    places = adamw.SlotPlaces(
        leaves=[p.data_ptr() for p in leaves], sizes=sizes, is_b=[i % 2 == 1 for i in range(len(sizes))],
        first=first.data_ptr(), second=second.data_ptr(), step=count.data_ptr(),
    )  # fmt: skip
    numbers = adamw.SlotNumbers(
        learning_rate=1e-2, loraplus_ratio=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, tokens=4.0, max_grad_norm=0.0
    )
    table, addresses = adamw.AdamWTable([places], device), [g.data_ptr() for g in gradients]
    theirs = [torch.nn.Parameter(p.clone()) for p in leaves]
    for p, g in zip(theirs, gradients, strict=True):
        p.grad = g / 4.0
    before = torch.cat(leaves)
    torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0).step()
    table.step(addresses, [numbers])
    moved = {"change": torch.cat(leaves) - before}
    wrong = disagreements(moved, {"change": torch.cat([p.detach() for p in theirs]) - before}, "AdamW")
    kernel = Kernel(
        kernel="AdamW", shape=f"{sum(sizes) / 1e6:.1f} M in {len(sizes)} leaves", rank=rank, moved=32 * sum(sizes),
        # held by the closure: the table knows addresses only
        work=lambda: (table.step(addresses, [numbers]), leaves, gradients, first, second, count)[0],
    )  # fmt: skip
    return wrong, kernel


def adapter_sizes(rank: int, layers: int = 32) -> list[int]:
    """Numbers of each A and B of one adapter on all seven linear layers."""
    pairs = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    return [rank * n for _ in range(layers) for pair in pairs for n in pair]


def mlp_kernels(slots: int, device: torch.device) -> Iterator[Kernel]:
    """Those of gated MLPs whose weights carry borders, where there is room for so many adapters."""
    if border_width(slots * MLP_RANK):
        p = gpu_bordered.Mlp.make(MLP_RANK, slots, device)
        shape = f"{HIDDEN}, {gpu_bordered.INNER}" + (f", {slots} slots" if slots > 1 else "")
        for name, work, moved in gpu_bordered.timings(p):
            yield Kernel(kernel=name, shape=shape, rank=MLP_RANK, work=work, moved=moved)


def find_wrong(slots: int, device: torch.device) -> list[str]:
    """Every LoRA kernel against reference.py (those of gated MLPs against torch in fp32), at every shape and rank."""
    wrong: list[str] = []
    if border_width(slots * MLP_RANK):
        for name, found, value in gpu_bordered.found_and_expected(gpu_bordered.Mlp.make(MLP_RANK, slots, device)):
            wrong += disagreements({name: found}, {name: value}, f"r {MLP_RANK}, {slots} slots")
    for inputs, outputs in PAIRS:
        for rank in RANKS:
            problem = Problem.make(inputs, outputs, rank, slots, device)
            wrong += disagreements(problem.products(), problem.expected(), f"{inputs}→{outputs}, r {rank}, {slots} slots")
    for count in SIBLINGS:
        for rank in RANKS:
            wrong += sibling_case(count, rank, slots, device)[0]
    return wrong


def all_kernels(slots: int, device: torch.device) -> Iterator[Kernel]:
    """The LoRA kernels and products, made one problem at a time."""
    for inputs, outputs in PAIRS:
        yield from base_kernels(inputs, outputs, device)
        for rank in RANKS:
            yield from lora_kernels(Problem.make(inputs, outputs, rank, slots, device))
    for count in SIBLINGS:
        for rank in RANKS:
            yield from sibling_case(count, rank, slots, device)[1]
    yield from mlp_kernels(slots, device)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every kernel")
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--slots", type=int, default=1, help="adapters that share the tokens; must divide them")
    made.add_argument("--commit", help="as for gpu_training.py")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, keep."""
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py needs a GPU")
    device = torch.device("cuda")
    wrong, softmax = softmax_case(CHUNK, VOCABULARY, device)
    steps = [adamw_case(adapter_sizes(rank), rank, device) for rank in RANKS]
    wrong += [line for each, _ in steps for line in each] + find_wrong(args.slots, device)
    if wrong:
        sys.exit("kernels disagree with the reference, no times are taken:\n" + "\n".join(wrong))
    print("every kernel agrees with its reference", flush=True)
    passed = {"passed": True, "tolerance": TOLERANCE}
    results = Results.start(
        "kernels", args.output, gpu=torch.cuda.get_device_name(), revision=args.commit, check=passed, slots=args.slots
    )
    clock = Clock(args.repeats)
    # none of them is kept: their tensors go as soon as they were measured
    for kernel in (*(case for _, case in steps), softmax):
        _measured(kernel, clock, results)
    for kernel in all_kernels(args.slots, device):
        _measured(kernel, clock, results)
    return 0


def _measured(kernel: Kernel, clock: Clock, results: Results) -> None:
    row = kernel.measure(clock)
    results.add(row)
    rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']} GB/s"
    name = f"{row['kernel']:22s} {row['shape']:26s} r {row['rank']!s:3s}"
    print(f"{name} {row['us']:9.1f} µs   {rate:>14s}   {row['fraction']:.2f} of {row['beside_us']:.1f} µs", flush=True)


if __name__ == "__main__":
    sys.exit(main())
