"""The hot kernels, shape by shape, beside a copy of the same bytes; the frozen products and attention beside torch's own.

    python benchmarks/gpu_kernels.py --output kernels.json

Every kernel is held to kernels/reference.py or to plain torch first; one that is wrong ends the run without a number. What this
GPU lacks (fp8 units, FlashAttention) is named and left out. Each timing starts with a cold L2 cache: a fill of 256 MiB runs right
before the kernel and its own time is taken off. The GPU is kept busy beforehand, so that the host has started everything by then.
`fraction`: the copy's time over the kernel's, both moving the bytes that the kernel can't avoid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine with the GPU may have the folder only
sys.path.insert(0, str(Path(__file__).parent))

import gpu_attention
import gpu_bordered
import gpu_fp8
import torch
from gpu_problems import MANY, MIXED_RANKS, TOKENS, TOLERANCE, Clock, Problem, Several, disagreements
from gpu_results import Results

from lorabank.kernels import reference
from lorabank.kernels.gpu import adamw, lora, loss, siblings
from lorabank.kernels.gpu.border_writing import border_width
from lorabank.kernels.gpu.storage import STORAGES

PAIRS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
RANKS = (16, 64)
SIBLINGS = (2, 3)
"""Gate and up; queries, keys and values."""
MLP_RANK = 16
HIDDEN, VOCABULARY, CHUNK = 4096, 128256, 1024
JOINED = (4096, 1024, 1024)
"""Outputs of queries, keys and values, whose gradients of B are made in one start."""


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


def lora_kernels(p: Problem) -> Iterator[Kernel]:
    """The products of one layer's forward and backward."""
    T, I, O = len(p.x), p.inputs, p.outputs  # noqa: E741
    narrow, a_bytes, b_bytes = p.narrow_bytes, 4 * p.A.numel(), 4 * p.B.numel()
    xa = lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width)
    y = torch.randn_like(p.dy)
    call: dict[str, Any] = {"shape": f"{I}→{O}{p.slots_text}", "rank": p.rank_text}
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


def sibling_case(count: int, each: Sequence[int], device: torch.device) -> tuple[list[str], list[Kernel]]:
    """What layers that read the same x share; held to the same products one layer after the other."""
    p = Problem.make(HIDDEN, HIDDEN, each, device)
    weights = [torch.randn_like(p.A) / HIDDEN**0.5 for _ in range(count)]
    ranks, scalings = [p.ranks] * count, [p.scaling] * count
    narrow = [lora.shrink(p.x, weight, p.tables, p.ranks, p.scaling, p.width) for weight in weights]
    alone = {
        "shrink": torch.cat([p.written(n) for n in narrow]),
        "change": torch.stack([lora.change(n, w, None, p.tables, p.ranks) for n, w in zip(narrow, weights, strict=True)]).sum(0),
        "outer": torch.cat([lora.outer(n, p.x, p.A, p.tables, p.ranks) for n in narrow]),
    }
    calls: dict[str, Callable[[], Any]] = {
        "shrink": lambda: siblings.shrink(p.x, weights, p.tables, ranks, scalings, p.width),
        "change": lambda: siblings.change(narrow, weights, p.tables, ranks),
        "outer": lambda: siblings.outer(narrow, p.x, weights, p.tables, ranks),
    }
    found = {
        "shrink": torch.cat([p.written(n) for n in calls["shrink"]()]), "change": calls["change"](),
        "outer": torch.cat(calls["outer"]()),
    }  # fmt: skip
    wrong = disagreements(
        found, {name: value.float() for name, value in alone.items()}, f"{count} siblings, r {p.rank_text}, {p.slots} slots"
    )
    moved = 2 * len(p.x) * HIDDEN + count * (p.narrow_bytes + 4 * p.A.numel())
    shape = f"{HIDDEN}, {count} siblings{p.slots_text}"
    return wrong, [Kernel(kernel=name, shape=shape, rank=p.rank_text, work=work, moved=moved) for name, work in calls.items()]


def joined_case(each: Sequence[int], device: torch.device, tokens: int = TOKENS) -> tuple[list[str], list[Kernel]]:
    """`outer_each`, with the sum of its parts, and that sum alone, where there is anything to add."""
    several = Several.make(Problem.make(HIDDEN, HIDDEN, each, device, tokens), JOINED)
    p = several.p
    wrong = disagreements(several.found(), several.expected(), f"{len(JOINED)} layers, r {p.rank_text}, {p.slots} slots")
    shape = f"{HIDDEN}→{' + '.join(map(str, JOINED))}{p.slots_text}"
    wide, leaves = 2 * len(p.x) * sum(JOINED), 4 * sum(p.each) * sum(JOINED)
    moved = wide + leaves + len(JOINED) * p.narrow_bytes
    kernels = [Kernel(kernel="outer_each", shape=shape, rank=p.rank_text, work=several.outer_each, moved=moved)]
    if several.folds_bytes:
        kernels.append(Kernel(kernel="fold", shape=shape, rank=p.rank_text, work=several.fold, moved=several.folds_bytes))
    return wrong, kernels


def product_case(inputs: int, outputs: int, device: torch.device, tokens: int = TOKENS) -> tuple[list[str], list[Kernel]]:
    """The frozen products, added in place to a tensor that exists, beside torch's plain ones."""
    torch.manual_seed(inputs + outputs)
    x, dy = (torch.randn(tokens, n, device=device, dtype=torch.bfloat16) for n in (inputs, outputs))
    W = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    kind = STORAGES["linear"]
    assert kind.add_forward is not None and kind.add_input_grad is not None
    forward, backward = kind.add_forward, kind.add_input_grad
    y, dx = torch.randn_like(dy) * inputs**0.5, torch.randn_like(x) * outputs**0.5  # as large as what is added
    expected = {
        "frozen product": y.float() + x.float() @ W.float().t(), "frozen input gradient": dx.float() + dy.float() @ W.float(),
    }  # fmt: skip
    forward(y, x, [W])
    backward(dx, dy, [W])
    wrong = disagreements({"frozen product": y, "frozen input gradient": dx}, expected, f"{inputs}→{outputs}")
    call: dict[str, Any] = {"shape": f"{inputs}→{outputs}", "rank": "–", "flop": 2 * tokens * inputs * outputs}
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    return wrong, [
        Kernel(kernel="frozen product", work=lambda: forward(y, x, [W]), beside=lambda: torch.mm(x, W.t()), **call),
        Kernel(kernel="frozen input gradient", work=lambda: backward(dx, dy, [W]), beside=lambda: torch.mm(dy, W), **call),
    ]


def attention_kernels(device: torch.device) -> Iterator[Kernel]:
    """Causal attention at the table's sizes, where ours isn't torch's."""
    if gpu_attention.missing(device) is None:
        a = gpu_attention.Attention.make(device)
        for name, work, beside, flop in gpu_attention.timings(a):
            yield Kernel(kernel=name, shape=a.shape, rank="–", work=work, beside=beside, flop=flop)


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
    """Those of gated MLPs: with borders where there is room for so many adapters, over an fp8 base where there are units."""
    p = gpu_bordered.Mlp.make(MLP_RANK, slots, device)
    shape = f"{HIDDEN}, {gpu_bordered.INNER}{f', {slots} slots' if slots > 1 else ''}"
    if border_width(slots * MLP_RANK):
        for name, work, moved in gpu_bordered.timings(p):
            yield Kernel(kernel=name, shape=shape, rank=MLP_RANK, work=work, moved=moved)
    if gpu_fp8.missing(device) is None:
        for name, work, moved in gpu_fp8.timings(p):
            yield Kernel(kernel=name, shape=shape, rank=MLP_RANK, work=work, moved=moved)


def adapters(slots: int) -> list[tuple[int, ...]]:
    """Ranks of the adapters in a batch, problem by problem: alike ones, and the many of mixed ranks."""
    return [*((rank,) * slots for rank in RANKS), MIXED_RANKS * (MANY // len(MIXED_RANKS))]


def left_out(device: torch.device) -> dict[str, str]:
    """Kernels that this GPU can't be asked for, and why."""
    reasons = {"attention": gpu_attention.missing(device), "fp8": gpu_fp8.missing(device)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def find_wrong(slots: int, device: torch.device) -> list[str]:
    """What `all_kernels` has, at every shape and rank: LoRA's products against reference.py, the others against torch in fp32."""
    wrong = [*_wrong_in_mlps(slots, device)]
    if gpu_attention.missing(device) is None:
        a = gpu_attention.Attention.make(device)
        wrong += disagreements(gpu_attention.found(a), gpu_attention.expected(a), a.shape, gpu_attention.TOLERANCE)
    for inputs, outputs in PAIRS:
        wrong += product_case(inputs, outputs, device)[0]
        for each in adapters(slots):
            p = Problem.make(inputs, outputs, each, device)
            wrong += disagreements(p.products(), p.expected(), f"{inputs}→{outputs}, r {p.rank_text}, {p.slots} slots")
    for each in adapters(slots):
        wrong += joined_case(each, device)[0]
        for count in SIBLINGS:
            wrong += sibling_case(count, each, device)[0]
    return wrong


def _wrong_in_mlps(slots: int, device: torch.device) -> Iterator[str]:
    p = gpu_bordered.Mlp.make(MLP_RANK, slots, device)
    pairs = [gpu_bordered.found_and_expected(p)] if border_width(slots * MLP_RANK) else []
    pairs += [gpu_fp8.found_and_expected(p)] if gpu_fp8.missing(device) is None else []
    for each in pairs:
        for name, found, value in each:
            yield from disagreements({name: found}, {name: value}, f"r {MLP_RANK}, {slots} slots")


def all_kernels(slots: int, device: torch.device) -> Iterator[Kernel]:
    """All but softmax and AdamW, made one problem at a time."""
    for inputs, outputs in PAIRS:
        yield from product_case(inputs, outputs, device)[1]
        for each in adapters(slots):
            yield from lora_kernels(Problem.make(inputs, outputs, each, device))
    for each in adapters(slots):
        for count in SIBLINGS:
            yield from sibling_case(count, each, device)[1]
        yield from joined_case(each, device)[1]
    yield from mlp_kernels(slots, device)
    yield from attention_kernels(device)


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
        "kernels", args.output, gpu=torch.cuda.get_device_name(), revision=args.commit, check=passed, slots=args.slots,
        left_out=left_out(device),
    )  # fmt: skip
    for name, reason in results.record["left_out"].items():
        print(f"{name:22s} left out: {reason}", flush=True)
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
