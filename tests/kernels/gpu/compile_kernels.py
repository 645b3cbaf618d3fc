"""Compiles every kernel for a GPU that isn't there, as a process of its own: the interpreter accepts what the compiler refuses.

    python compile_kernels.py 90 16 64        # compute capability 9.0; widths
Prints one line a kernel: its name, registers of a thread, bytes spilled.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorabank.kernels import fp8
from lorabank.kernels.gpu import border_writing, bordered, gated, gated_mlp, lora, loss, outer_each, rounding, siblings, sums
from lorabank.kernels.tables import RouteTables, drop_tables, route_tables

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    fp8.E4M3: "*fp8e4nv",
}  # fmt: skip
E4M3_FROM = 10 * fp8.OLDEST[0] + fp8.OLDEST[1]
"""Compute capability whose code can make e4m3 numbers."""
ASSEMBLY = {"_activate", "_middle", "_activate_raw", "_middle_raw", "_softmax_kernel"}
"""Kernels that torch can't read (fast_math.py): they belong to opaque ops or are never traced, so it isn't asked for writes."""
OPAQUE = {"_round_through"}
"""Kernels of opaque ops, which torch doesn't read."""
TABLES = {"order", "tiles", "chunks", "spans", "ranks", "k0", "k1", "k2", "k3"}
LAUNCHED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


class Recorder:
    """Stands in for a kernel: notes how it would be started."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: LAUNCHED.append((self.kernel, args, kwargs))


def record(width: int, dtype: torch.dtype, capability: int) -> None:
    """Start every product once, on small tensors."""
    tokens, features, capacity = 4096, 1024, 2 * width
    tables = route_tables({0: range(2)}, 2, tokens // 2, 1)
    ranks, scaling = torch.tensor([[0, width]], dtype=torch.int32), torch.ones(1)
    odds = torch.zeros(1, 2, dtype=torch.int32)
    x, A = torch.empty(tokens, features, dtype=dtype), torch.empty(capacity, features)
    for size in (2, 1):  # many tokens, and so few that products are split
        few = route_tables({0: range(size)}, size, 64, 1) if size == 1 else tables
        part = x[: few.order_N.shape[0]]
        narrow = lora.shrink(part, A, few, ranks, scaling, width)
        lora.change(narrow, A, A[0], few, ranks)
        lora.expand_(part, narrow, A, few, ranks)
        lora.outer(narrow, part, A, few, ranks)
        lora.outer_and_shrink([narrow], [part], [A], few, [ranks], [scaling])
        batch = drop_tables(few.order_N, 64, [1], torch.arange(len(part) // 64)).tensors
        lora.shrink(part, A, few, ranks, scaling, width, [*batch, odds])
        lora.change(narrow, A, None, few, ranks, [*batch, odds])
        lora.expand_(part, narrow, A, few, ranks, [*batch, odds])
        lora.outer(narrow, part, A, few, ranks, [*batch, odds])
        if width <= siblings.WIDEST:
            for count in (2, 3, 4):
                siblings.shrink(part, [A] * count, few, [ranks] * count, [scaling] * count, width)
                siblings.change([narrow] * count, [A] * count, few, [ranks] * count)
                siblings.outer([narrow] * count, part, [A] * count, few, [ranks] * count)
            for count in (2, 4):
                drops = [*batch, *[odds] * count]
                siblings.shrink(part, [A] * count, few, [ranks] * count, [scaling] * count, width, drops)
                siblings.change([narrow] * count, [A] * count, few, [ranks] * count, drops=drops)
                siblings.outer([narrow] * count, part, [A] * count, few, [ranks] * count, drops)
            siblings.change([narrow] * 2, [A] * 2, few, [ranks] * 2, out_NF=part)
            siblings.change([narrow] * 2, [A] * 2, few, [ranks] * 2, out_NF=part, drops=[*batch, odds, odds])
            for count in (1, 2):
                more = [torch.empty_like(part) for _ in range(count)]
                siblings.change([narrow] * (count + 1), [A] * (count + 1), few, [ranks] * (count + 1), out_NF=part, more=more)
            record_borders(part, narrow, A, few, ranks, scaling, width)
        if width <= gated_mlp.WIDEST_RANK:
            for activation in gated_mlp.ACTIVATIONS:
                gated_mlp.activate(part, part, activation)
                gated_mlp.middle(part, part, part, [narrow] * 3, [A] * 3, few, [ranks] * 3, activation)
            if capability >= E4M3_FROM:
                record_rounded(part, narrow, A, few, ranks, scaling, width)


def record_borders(
    x: torch.Tensor, narrow: torch.Tensor, A: torch.Tensor, tables: RouteTables, ranks: torch.Tensor, scaling: torch.Tensor,
    width: int,
) -> None:  # fmt: skip
    """Start what frozen weights with borders need."""
    features = x.shape[1]
    for count in (1, 2, 3, 4):
        pads = border_writing.STEP * (2 if width > 16 or count > 3 else 1)
        poison, shadow = border_writing.poison_like(ranks, count, features), torch.empty(4 * pads, features, dtype=x.dtype)
        columns = torch.empty(count, features, pads, dtype=x.dtype)
        entries = [
            border_writing.Border(
                border=columns[i] if i != 1 else columns[i].view(pads, features).t(), leaf=A, other=A, ranks=ranks,
                shadow=shadow[i * pads : (i + 1) * pads], poison=poison[i], rows=len(A),
            )
            for i in range(count)
        ]  # fmt: skip
        border_writing.write(entries)
        lists = {"ranks": [ranks] * count, "scalings": [scaling] * count, "poison": list(poison)}
        layouts = [(pads, pads // count, 0)] + ([(2 * pads, pads, pads)] if count == 2 else [])
        for wide, share, left in layouts:
            group = bordered.Group(shadow=shadow, width=width, pads=wide, share=share, left=left, **lists)
            group.finish(group.widen(x, tables)[0], tables, x)
            group.finish(group.widen(x, tables, shape=(32, 64, 2, 2, 2) if width == 16 else (16, 64, 4, 2, 2))[0], tables)
        outer_each.outer_each([narrow] * count, [x] * count, [A] * count, tables, lists["ranks"])


def record_rounded(
    x: torch.Tensor, narrow: torch.Tensor, A: torch.Tensor, tables: RouteTables, ranks: torch.Tensor, scaling: torch.Tensor,
    width: int,
) -> None:  # fmt: skip
    """Start what a gated MLP over an fp8 base has of its own; for GPUs that have e4m3."""
    rounding.quantize(x)
    for count in (1, 2):
        maxima, same = rounding.maxima_like(x, count), ([A] * count, tables, [ranks] * count, [scaling] * count)
        rounding.round_and_shrink([x] * count, maxima, *same, width)
        rounding.round_outer_and_shrink([x] * count, maxima, [narrow] * count, *same)
    for activation in gated_mlp.ACTIVATIONS:
        for noted in (None, maxima):  # pyright: ignore[reportPossiblyUnboundVariable]
            gated.activate(x, x, [narrow] * 2, [A] * 2, tables, [ranks] * 2, activation, noted)
            for outers in (1, 3):
                gated.middle(x, x, x, [narrow] * 3, [A] * 3, tables, [ranks] * 3, activation, noted, outers)


def compile_for(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> str:
    """Machine code of one start; a line about it."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {name: value for name, value in kwargs.items() if name in names}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else _type(given[name]) for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and _aligned(given[name])]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([dump, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert found is not None, text
    shared = made.metadata.shared
    return f"{kernel.__name__} {found[1]} registers, {found[2]} bytes of stack, {shared} bytes shared, {options} {constants}"


class Target:
    """What torch asks of a GPU to read a kernel: its generation."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def check_writes(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """No tensor may be written under two names, as torch reads the kernel: it would keep the one that isn't really written."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {name: value for name, value in kwargs.items() if name in names}
    written = sorted(_written(kernel, given))
    addresses = [given[name].data_ptr() for name in written]
    assert written, f"{kernel.__name__}: torch sees no writes"
    assert not TABLES & set(written) or kernel.__name__ in OPAQUE, f"{kernel.__name__}: torch sees writes to a table: {written}"
    assert len(set(addresses)) == len(addresses), f"{kernel.__name__}: {written} are written, and some are one tensor"


def _written(kernel: Any, given: dict[str, Any]) -> Iterable[str]:
    """The arguments that torch sees the kernel write to."""
    try:
        from torch._higher_order_ops.triton_kernel_wrap import identify_accessed_tensors
    except ImportError:  # before torch 2.13
        from torch._higher_order_ops.triton_kernel_wrap import (
            identify_mutated_tensors,  # pyright: ignore[reportAttributeAccessIssue]
        )

        return identify_mutated_tensors(kernel, given, {})
    return (place.name for place in identify_accessed_tensors(kernel, given, {}).read_writes.writes)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i32"


def _aligned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or value % 16 == 0


def main() -> None:
    """Compile for the capability in the first argument."""
    vars(sums)["launch"] = Recorder
    vars(border_writing)["_write"] = Recorder(border_writing._write)
    vars(loss)["_softmax_kernel"] = Recorder(loss._softmax_kernel)
    for dtype in (torch.bfloat16, torch.float32):
        loss.softmax_(torch.empty(2, 40000, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    for width in map(int, sys.argv[2:] or ("16", "64", "256")):
        record(width, torch.bfloat16, int(sys.argv[1]))
    record(16, torch.float32, int(sys.argv[1]))
    triton.runtime.driver.set_active(Target(int(sys.argv[1])))
    seen: set[str] = set()
    for kernel, args, kwargs in LAUNCHED:
        key = str((kernel.__name__, dict(kwargs), [_type(a) for a in args]))
        if key not in seen:
            seen.add(key)
            if kernel.__name__ not in ASSEMBLY:
                check_writes(kernel, args, kwargs)
            sys.stdout.write(compile_for(kernel, args, kwargs, int(sys.argv[1])) + "\n")


if __name__ == "__main__":
    main()
