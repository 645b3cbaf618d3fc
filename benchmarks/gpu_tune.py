"""LoRA's kernels with other tile sizes, warps and steps loaded ahead: is what lora.py chooses still the best?

    python benchmarks/gpu_tune.py --kernels shrink change --seconds 60

Each choice is held to the one that lora.py makes before it is timed; the clock is gpu_kernels.py's (cold L2). Prints, shape by
shape, the choices from the fastest on, beside a copy of the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_bordered
import torch
import triton
from gpu_problems import MANY, MIXED_RANKS, TOKENS, Clock, Problem
from torch import Tensor

from lorabank.kernels.gpu import lora, sums
from lorabank.kernels.tables import TILE

SHOWN = 8
TOLERANCE = 2e-2
"""Relative norm; splits are added in another order, weights rounded elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to start a kernel."""

    text: str
    run: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A kernel at a shape."""

    now: Callable[[], Tensor]
    """As lora.py starts it."""
    moved: int
    """Bytes that it reads and writes at least."""
    choices: Iterator[Choice]
    meant: Callable[[Tensor], Tensor] = lambda found: found
    """What counts of a result."""


def shrinks(p: Problem) -> Tuning:
    """x·Aᵀ."""

    def made() -> Iterator[Choice]:
        T, features = p.x.shape
        tiles = p.tables.tiles_S4.shape[0]
        options = itertools.product((True, False), (4, 2, 1), (64, 128, 256), (4, 3, 2), (4, 8))
        for turned, splits, block_f, stages, warps in options:
            if stages * block_f * (TILE * 2 + p.width * 4) > 200 * 1024 or (turned and p.width < 64):
                continue
            share = -(-features // (splits * block_f)) * block_f

            def run(turned=turned, splits=splits, block_f=block_f, warps=warps, stages=stages, share=share) -> Tensor:
                narrow = torch.empty((T, p.width), dtype=p.x.dtype, device=p.x.device)
                parts = narrow if splits == 1 else torch.empty((splits, T, p.width), device=p.x.device)
                lora._shrink[(tiles, splits, 1)](
                    p.x, p.A, narrow, parts, p.tables.order_N, p.tables.tiles_S4, p.ranks, p.scaling,
                    p.ranks, p.ranks, p.ranks, features, T, share,
                    WIDTH=p.width, BLOCK_M=TILE, BLOCK_R=p.width, BLOCK_F=block_f, WHOLE=splits == 1, TURNED=turned,
                    DROP=False, PRECISION="tf32", num_warps=warps, num_stages=stages,
                )  # fmt: skip
                if splits > 1:
                    sums.gather([narrow], [parts], p.tables, [p.ranks], [p.scaling])
                return narrow

            text = f"{'turned ' if turned else ''}splits {splits} block_f {block_f} warps {warps} stages {stages}"
            yield Choice(text=text, run=run)

    return Tuning(
        now=lambda: lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width),
        moved=2 * p.x.numel() + 4 * p.A.numel() + p.narrow_bytes,
        choices=made(),
        meant=p.written,
    )


def changes(p: Problem) -> Tuning:
    """xAᵀ·B, written into a new y."""
    xa = lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width)

    def made() -> Iterator[Choice]:
        tiles, features = p.tables.tiles_S4.shape[0], p.B.shape[1]
        for group, block_f, warps in itertools.product((1, 2, 4), (64, 128, 256, 512), (2, 4, 8)):
            if group * TILE * block_f > 2**15:
                continue

            def run(group=group, block_f=block_f, warps=warps) -> Tensor:
                out = torch.empty_like(p.dy)
                lora._expand[(tiles, -(-features // block_f))](
                    out, xa, p.B, p.B, p.B, p.tables.order_N, p.tables.tiles_S4, p.ranks, p.ranks, p.ranks, p.ranks, features,
                    tiles,
                    WIDTH=p.width, BLOCK_M=group * TILE, BLOCK_R=p.width, BLOCK_F=block_f, GROUP=group, ADD=False, BIAS=False,
                    ONTO=False, DROP=False, PRECISION="tf32", num_warps=warps, num_stages=1,
                )  # fmt: skip
                return out

            yield Choice(text=f"tiles {group} block_f {block_f} warps {warps}", run=run)

    moved = p.narrow_bytes + 4 * p.B.numel() + 2 * p.dy.numel()
    return Tuning(now=lambda: lora.change(xa, p.B, None, p.tables, p.ranks), moved=moved, choices=made())


def outers(p: Problem) -> Tuning:
    """The gradient of A, with its sums over chunks."""
    dxa = lora.shrink(p.dy, p.B, p.tables, p.ranks, p.scaling, p.width)

    def made() -> Iterator[Choice]:
        features, chunks = p.x.shape[1], p.tables.chunks_C4.shape[0]
        for block_f, block_n, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (3, 5)):
            if stages * block_n * (block_f + p.width) * 2 > 200 * 1024:
                continue

            def run(block_f=block_f, block_n=block_n, warps=warps, stages=stages) -> Tensor:
                grad = torch.empty_like(p.A)
                parts = torch.empty((chunks, p.width, features), device=p.x.device)
                lora._outer[(chunks, -(-features // block_f), 1)](
                    dxa, p.x, parts, grad, p.tables.order_N, p.tables.chunks_C4, p.ranks,
                    p.ranks, p.ranks, p.ranks, features,
                    WIDTH=p.width, BLOCK_N=block_n, BLOCK_R=p.width, BLOCK_F=block_f, DROP=False, PRECISION="tf32",
                    STAGES=stages, num_warps=warps, num_stages=1,
                )  # fmt: skip
                sums.fold([grad], [parts], p.tables, [p.ranks])
                return grad

            yield Choice(text=f"block_f {block_f} block_n {block_n} warps {warps} stages {stages}", run=run)

    moved = 2 * p.x.numel() + p.narrow_bytes + 4 * p.A.numel()
    return Tuning(now=lambda: lora.outer(dxa, p.x, p.A, p.tables, p.ranks), moved=moved, choices=made())


def throughs(p: Problem) -> Tuning:
    """dB and dy·Bᵀ in one pass over dy, with both sums."""
    xa = lora.shrink(p.x, p.A, p.tables, p.ranks, p.scaling, p.width)

    def made() -> Iterator[Choice]:
        (T, features), chunks = p.dy.shape, p.tables.chunks_C4.shape[0]
        for block_f, block_n, warps, stages in itertools.product((128, 256, 512), (32, 64, 128), (4, 8), (2, 4)):
            if stages * block_n * (block_f + p.width) * 2 > 200 * 1024:
                continue

            def run(block_f=block_f, block_n=block_n, warps=warps, stages=stages) -> Tensor:
                columns = -(-features // block_f)
                grad, narrow = torch.empty_like(p.B), torch.empty((T, p.width), dtype=p.dy.dtype, device=p.dy.device)
                parts = torch.empty((chunks, p.width, features), device=p.dy.device)
                shares = torch.empty((columns, T, p.width), device=p.dy.device)
                lora._through[(chunks, columns)](
                    xa, p.dy, p.B, parts, shares, grad, p.tables.order_N, p.tables.chunks_C4, p.ranks, features, T,
                    WIDTH=p.width, BLOCK_N=block_n, BLOCK_F=block_f, PRECISION="tf32", STAGES=stages, num_warps=warps,
                    num_stages=1,
                )  # fmt: skip
                sums.fold([grad], [parts], p.tables, [p.ranks])
                sums.gather([narrow], [shares], p.tables, [p.ranks], [p.scaling])
                return grad

            yield Choice(text=f"block_f {block_f} block_n {block_n} warps {warps} stages {stages}", run=run)

    return Tuning(
        now=lambda: lora.outer_and_shrink([xa], [p.dy], [p.B], p.tables, [p.ranks], [p.scaling])[0][0],
        moved=2 * p.dy.numel() + 2 * p.narrow_bytes + 8 * p.B.numel(),
        choices=made(),
    )


def middles(p: Problem) -> Tuning:
    """The backward of a gated MLP's activation."""
    mlp = gpu_bordered.Mlp.make(p.each[0], p.slots, p.x.device)
    moved = next(moved for name, _, moved in gpu_bordered.timings(mlp) if name == "middle")
    choices = (Choice(text=text, run=run) for text, run in gpu_bordered.middles(mlp))
    return Tuning(now=lambda: gpu_bordered.middle(mlp)[0], moved=moved, choices=choices)


def widens(p: Problem) -> Tuning:
    """x with both borders of a gated MLP."""
    mlp = gpu_bordered.Mlp.make(p.each[0], p.slots, p.x.device)
    moved = next(moved for name, _, moved in gpu_bordered.timings(mlp) if name == "widen, two layers")
    choices = (Choice(text=text, run=run) for text, run in gpu_bordered.widens(mlp))
    return Tuning(now=lambda: mlp.pair.widen(mlp.x, mlp.tables)[0], moved=moved, choices=choices)


KERNELS = {"shrink": shrinks, "change": changes, "outer": outers, "through": throughs, "middle": middles, "widen": widens}
SHAPES = {
    "shrink": ((4096, 4096), (14336, 4096)),
    "change": ((4096, 4096), (4096, 14336)),
    "outer": ((4096, 4096), (14336, 4096)),
    "through": ((4096, 4096), (4096, 1024)),
    "middle": ((4096, 14336),),
    "widen": ((4096, 14336),),
}
"""(inputs, outputs): what each kernel reads or writes is 4096 and 14336 wide."""


def tune(name: str, shape: tuple[int, int], each: Sequence[int], clock: Clock, seconds: float) -> None:
    """Print the choices of one kernel at one shape, the fastest first."""
    p = Problem.make(*shape, each, torch.device("cuda"))
    tuning = KERNELS[name](p)
    expected, began = tuning.meant(tuning.now()).float(), time.monotonic()
    copy, found = clock.copy_us(tuning.moved), [(clock.us(tuning.now), "as it is started now")]
    for choice in tuning.choices:
        if time.monotonic() - began > seconds:
            print(f"  (no further choices after {seconds:.0f} s)")
            break
        try:
            off = float((tuning.meant(choice.run()).float() - expected).norm() / expected.norm())
        except triton.runtime.errors.OutOfResources:
            continue
        if off <= TOLERANCE:
            found.append((clock.us(choice.run), choice.text))
        else:
            print(f"  {choice.text}: WRONG, off by {off:.1e}")
    print(f"{name} {shape[0]}→{shape[1]}{p.slots_text}, r {p.rank_text}: copy of the same bytes {copy:.1f} µs")
    for us, text in sorted(found)[:SHOWN]:
        print(f"  {us:7.1f} µs  {copy / us:.2f}  {text}")
    if found[0] not in sorted(found)[:SHOWN]:
        print(f"  {found[0][0]:7.1f} µs  {copy / found[0][0]:.2f}  {found[0][1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try them all."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--many", action="store_true", help=f"{MANY} adapters of mixed ranks instead")
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--seconds", type=float, default=30.0, help="for one kernel at one shape")
    args = made.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("gpu_tune.py needs a GPU")
    clock = Clock(args.repeats)
    print(f"{TOKENS} tokens, {torch.cuda.get_device_name()}")
    for name in args.kernels:
        for shape in SHAPES[name]:
            each = MIXED_RANKS * (MANY // len(MIXED_RANKS)) if args.many else (args.rank,)
            tune(name, shape, each, clock, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
