"""LoRA's products for all slots of a batch, grouped by slot, in Triton.

`shrink` makes x·Aᵀ (and dy·Bᵀ), `change` writes ·B into a new y (and ·A into a new dx) onto which the frozen product is then
added, `expand_` adds it to a y that exists already, `outer` makes the gradients of A and B. Each visits only its slot's own
tokens and ranks, so cost follows the ranks in use and nothing that isn't finite crosses over to another slot or to a base row.
Sums are in fp32 and in a fixed order: the same input gives the same bits.

The plain twin is reference.py. Shapes: N entries of the sorted tokens (see tables.py), F features (I of x, O of y), R ranks,
W width of the narrow tensors (the largest rank, rounded up), P slot numbers. A and B are capacity buffers (ΣR, F), a slot being
the range of rows that `ranks_P2` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.dropout import Drops, _bar, _column_keys, _kept, _row_keys, pointers
from lorabank.kernels.gpu.runs import _entries, _run, _straight, grouped, many
from lorabank.kernels.tables import TILE, RouteTables

WIDEST_BLOCK = 128
"""Ranks that one program holds."""
PROGRAMS = 160
"""Programs that keep a large GPU busy; fewer are split along the features."""
ONE_PASS_WIDTH = 16
"""Up to so many ranks a column's share of dy·Bᵀ is cheaper to write down than dy is to read again."""
SHARED_BYTES = 96 * 1024
"""Shared memory that a program's pipeline may take: what every GPU from Turing's successors on has."""


@triton.jit
def _shrink(
    x, weight, narrow, parts, order, tiles, ranks, scaling, odds, steps, draws, features, entries, share,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
    TURNED: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over features of x[token, f] · weight[start + rank, f]: with WHOLE scaled into narrow, else a share into parts.

    With TURNED the ranks are the product's rows: rounded in registers, from where such products take their left side only.
    """
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if (count > 0) & (slot >= 0):
        start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
        if block * BLOCK_R < rank:
            m, r = tl.arange(0, BLOCK_M), block * BLOCK_R + tl.arange(0, BLOCK_R)
            rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
            key_m, bar = _row_keys(odds, steps, draws, slot, first + m, m < count, DROP), _bar(odds, slot, DROP)
            begin = split * share
            end = tl.minimum(features, begin + share)
            total = tl.zeros((BLOCK_R, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_R), dtype=tl.float32)
            for at in range(begin, end, BLOCK_F):
                f = at + tl.arange(0, BLOCK_F)
                x_tile = tl.load(
                    x + rows[:, None] * features + f[None, :], mask=(m < count)[:, None] & (f < end)[None, :], other=0.0
                )
                w_tile = tl.load(
                    weight + (start + r)[:, None] * features + f[None, :],
                    mask=(r < rank)[:, None] & (f < end)[None, :],
                    other=0.0,
                )
                x_tile = _kept(x_tile, 0.0, key_m, _column_keys(f, DROP), bar, DROP)
                if TURNED:
                    total = tl.dot(w_tile.to(x_tile.dtype), tl.trans(x_tile), total, input_precision=PRECISION)
                else:
                    total = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), total, input_precision=PRECISION)
            if TURNED:
                total = tl.trans(total)
            kept = (m < count)[:, None] & (r < rank)[None, :]
            entry = (first + m).to(tl.int64)
            if WHOLE:
                scaled = (total * tl.load(scaling + slot)).to(narrow.dtype.element_ty)
                tl.store(narrow + entry[:, None] * WIDTH + r[None, :], scaled, mask=kept)
            else:
                entry += split.to(tl.int64) * entries
                tl.store(parts + entry[:, None] * WIDTH + r[None, :], total, mask=kept)


@triton.jit
def _expand(
    out, narrow, weight, bias, onto, order, tiles, ranks, odds, steps, draws, features, last,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, ONTO: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over ranks of narrow · weight[start + rank, f]: with ADD added to out[token, f], else written there (+ bias).

    With ONTO that, rounded, is added to onto, for every token.
    """
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, count = _run(tiles, tile, last, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.load(tiles + tile * 4 + 1)
    routed = slot >= 0
    place = tl.maximum(slot, 0)
    start = tl.load(ranks + place * 2).to(tl.int64)
    rank = tl.where(routed, tl.load(ranks + place * 2 + 1), 0)
    if (count > 0) & ((not ADD) | (rank > 0) | ONTO):
        m, f = tl.arange(0, BLOCK_M), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_F), dtype=tl.float32)
        for block in tl.static_range(WIDTH // BLOCK_R):
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            small = tl.load(
                narrow + (first + m).to(tl.int64)[:, None] * WIDTH + r[None, :],
                mask=(m < count)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            w_tile = tl.load(
                weight + (start + r)[:, None] * features + f[None, :],
                mask=(r < rank)[:, None] & (f < features)[None, :],
                other=0.0,
            )
            total = tl.dot(small, w_tile.to(small.dtype), total, input_precision=PRECISION)
        key_m, bar = _row_keys(odds, steps, draws, slot, first + m, m < count, DROP), _bar(odds, slot, DROP)
        total = _kept(total, 0.0, key_m, _column_keys(f, DROP), bar, DROP)
        inside = (m < count)[:, None] & (f < features)[None, :]
        target = out + rows[:, None] * features + f[None, :]
        if BIAS:
            total += tl.load(bias + f, mask=f < features, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        made = total.to(out.dtype.element_ty)
        if ONTO:
            more = tl.load(onto + rows[:, None] * features + f[None, :], mask=inside, other=0.0).to(tl.float32)
            made = (made.to(tl.float32) + more).to(out.dtype.element_ty)
        tl.store(target, made, mask=inside)


@triton.jit
def _outer_step(
    rows, n, narrow, wide, total, first, count, r, f, features, columns, bar, odds, steps, draws, slot,
    WIDTH: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_outer` for some tokens: the sum with them. Its rows beyond the slot's ranks mean nothing."""
    small = _entries(narrow, (first + n).to(tl.int64), n < count, r, WIDTH)
    tile = tl.load(wide + rows[:, None] * features + f[None, :], mask=(n < count)[:, None] & (f < features)[None, :], other=0.0)
    key_n = _row_keys(odds, steps, draws, slot, first + n, n < count, DROP)
    tile = _kept(tile, 0.0, key_n, columns, bar, DROP)
    return tl.dot(tl.trans(small), tile, total, input_precision=PRECISION)


@triton.jit
def _outer(
    narrow, wide, parts, grad, order, chunks, ranks, odds, steps, draws, features,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, DROP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over a chunk's tokens of narrow[entry, rank] · wide[token, f]: into grad for a slot's only chunk, else into parts."""
    chunk, column, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    place = tl.maximum(slot, 0) * 2
    start, rank = tl.load(ranks + place).to(tl.int64), tl.load(ranks + place + 1)
    if (count > 0) & (slot >= 0) & (block * BLOCK_R < rank):
        r, f = block * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_F + tl.arange(0, BLOCK_F)
        columns, bar = _column_keys(f, DROP), _bar(odds, slot, DROP)
        total = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            total = _outer_step(
                (base + n).to(tl.int64), n, narrow, wide, total, first, count, r, f, features, columns, bar, odds, steps, draws,
                slot, WIDTH, DROP, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            total = _outer_step(
                rows, n, narrow, wide, total, first, count, r, f, features, columns, bar, odds, steps, draws, slot, WIDTH, DROP,
                PRECISION,
            )  # fmt: skip
        inside = (r < rank)[:, None] & (f < features)[None, :]
        if only == 1:
            tl.store(grad + (start + r)[:, None] * features + f[None, :], total, mask=inside)
        else:
            row = chunk.to(tl.int64) * WIDTH + r
            tl.store(parts + row[:, None] * features + f[None, :], total, mask=inside)


@triton.jit
def _through_step(
    rows, n, narrow, wide, shares, w_turned, total, column, first, count, rank, r, f, features, entries,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_through` for some tokens: the sum with them."""
    kept = (n < count)[:, None] & (r < rank)[None, :]
    at = (first + n).to(tl.int64)[:, None] * WIDTH + r[None, :]
    small = _entries(narrow, (first + n).to(tl.int64), n < count, r, WIDTH)  # the sum's rows beyond the ranks mean nothing
    tile = tl.load(wide + rows[:, None] * features + f[None, :], mask=(n < count)[:, None] & (f < features)[None, :], other=0.0)
    total = tl.dot(tl.trans(small), tile, total, input_precision=PRECISION)
    share = tl.dot(tile, w_turned, input_precision=PRECISION)
    tl.store(shares + column.to(tl.int64) * entries * WIDTH + at, share, mask=kept)
    return total


@triton.jit
def _through(
    narrow, wide, weight, parts, shares, grad, order, chunks, ranks, features, entries,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_outer`, and in the same pass over wide each column's share of `_shrink`: shares[column, entry, rank]. For few ranks."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    place = tl.maximum(slot, 0) * 2
    start, rank = tl.load(ranks + place).to(tl.int64), tl.load(ranks + place + 1)
    if (count > 0) & (slot >= 0) & (rank > 0):
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (r < rank)[:, None] & (f < features)[None, :]
        w_tile = tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=inside, other=0.0).to(wide.dtype.element_ty)
        w_turned = tl.trans(w_tile)
        total = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            total = _through_step(
                (base + n).to(tl.int64), n, narrow, wide, shares, w_turned, total, column, first, count, rank, r, f, features,
                entries, WIDTH, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            total = _through_step(
                rows, n, narrow, wide, shares, w_turned, total, column, first, count, rank, r, f, features, entries, WIDTH,
                PRECISION,
            )  # fmt: skip
        if only == 1:
            tl.store(grad + (start + r)[:, None] * features + f[None, :], total, mask=inside)
        else:
            row = chunk.to(tl.int64) * WIDTH + r
            tl.store(parts + row[:, None] * features + f[None, :], total, mask=inside)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # only fp32 has a choice to make


def _stages(rows: int, block_f: int, item: int, block_r: int) -> int:
    """How many steps of a loop are loaded ahead: tiles of both operands, the narrow one in fp32."""
    return max(1, min(4, SHARED_BYTES // (block_f * (rows * item + block_r * 4))))


def shrink(
    x_NF: Tensor,
    weight_RF: Tensor,
    tables: RouteTables,
    ranks_P2: Tensor,
    scaling_P: Tensor,
    width: int,
    drops: Drops = (),
    entries: int | None = None,
) -> Tensor:
    """scaling · x·weightᵀ of each entry, in x's dtype, (N, W). Entries without a slot, ranks that a slot lacks stay unwritten.

    `drops`: what x is dropped by. `entries`: N, where several entries are one row of x.
    """
    entries, features = x_NF.shape[0] if entries is None else entries, x_NF.shape[1]
    tiles = tables.tiles_S4.shape[0]
    block_r = min(width, WIDEST_BLOCK)
    item = x_NF.element_size()
    turned = many(block_r, item)
    block_f = 128 if item == 2 and not turned else 64
    # enough programs for a GPU, twice as many where they take long, but no part shorter than 512 features
    splits = max(1, min(features // 512, PROGRAMS * (1 + turned) // tiles))
    block_f = block_f if splits > 1 or turned or item > 2 else 256
    share = -(-features // (splits * block_f)) * block_f
    block_f = min(block_f, 128) if drops else block_f  # a mask takes registers; sums stay in the same order
    narrow = torch.empty((entries, width), dtype=x_NF.dtype, device=x_NF.device)
    parts = narrow if splits == 1 else torch.empty((splits, entries, width), dtype=torch.float32, device=x_NF.device)
    sums.launch(_shrink)[(tiles, splits, width // block_r)](
        x_NF, weight_RF, narrow, parts, tables.order_N, tables.tiles_S4, ranks_P2, scaling_P, *pointers(drops, 1, ranks_P2),
        features, entries, share,
        WIDTH=width, BLOCK_M=TILE, BLOCK_R=block_r, BLOCK_F=block_f, WHOLE=splits == 1, TURNED=turned, DROP=bool(drops),
        PRECISION=_precision(x_NF.dtype), num_warps=4, num_stages=_stages(TILE, block_f, item, block_r),
    )  # fmt: skip
    if splits > 1:
        sums.gather([narrow], [parts], tables, [ranks_P2], [scaling_P])
    return narrow


def expand_(
    out_NF: Tensor,
    narrow_NW: Tensor,
    weight_RF: Tensor,
    tables: RouteTables,
    ranks_P2: Tensor,
    drops: Drops = (),
    onto: Tensor | None = None,
) -> None:
    """out += narrow·weight in place, for tokens with a slot; rounded once. Other rows aren't touched.

    `drops`: what narrow·weight is dropped by, where out is dx. `onto`: (N, F), added to every row of that, which is rounded
    before and after as two passes would.
    """
    _expand_into(out_NF, narrow_NW, weight_RF, None, tables, ranks_P2, drops, add=True, onto=onto)


def change(
    narrow_NW: Tensor, weight_RF: Tensor, bias_F: Tensor | None, tables: RouteTables, ranks_P2: Tensor, drops: Drops = ()
) -> Tensor:
    """narrow·weight (+ bias) of every token, (N, F), in narrow's dtype: what the frozen product is then added onto.

    `drops`: as in `expand_`.
    """
    out = torch.empty((narrow_NW.shape[0], weight_RF.shape[1]), dtype=narrow_NW.dtype, device=narrow_NW.device)
    _expand_into(out, narrow_NW, weight_RF, bias_F, tables, ranks_P2, drops, add=False)
    return out


def _expand_into(
    out: Tensor,
    narrow: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tables: RouteTables,
    ranks: Tensor,
    drops: Drops,
    *,
    add: bool,
    onto: Tensor | None = None,
) -> None:
    width, features = narrow.shape[1], weight.shape[1]
    block_r, tiles = min(width, WIDEST_BLOCK), tables.tiles_S4.shape[0]
    group = grouped(block_r, narrow.element_size())
    block_f = 256 if narrow.element_size() == 2 and group == 1 else 128
    sums.launch(_expand)[(tiles, -(-features // block_f))](
        out, narrow, weight, weight if bias is None else bias, narrow if onto is None else onto, tables.order_N, tables.tiles_S4,
        ranks, *pointers(drops, 1, ranks), features, tiles,
        WIDTH=width, BLOCK_M=group * TILE, BLOCK_R=block_r, BLOCK_F=block_f, GROUP=group, ADD=add, BIAS=bias is not None,
        ONTO=onto is not None, DROP=bool(drops), PRECISION=_precision(narrow.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip


def outer(
    narrow_NW: Tensor,
    wide_NF: Tensor,
    like_RF: Tensor,
    tables: RouteTables,
    ranks_P2: Tensor,
    drops: Drops = (),
    later: sums.Later | None = None,
) -> Tensor:
    """The gradient of a capacity buffer, fp32 (ΣR, F): narrowᵀ·wide for each slot. Rows that belong to no slot stay unwritten.

    `drops`: what wide is dropped by. `later`: whose `fold` completes it, together with others.
    """
    width, features = narrow_NW.shape[1], wide_NF.shape[1]
    chunks = tables.chunks_C4.shape[0]
    grad = torch.empty_like(like_RF)
    parts = torch.empty((tables.summed, width, features), dtype=torch.float32, device=grad.device)
    block_r = min(width, WIDEST_BLOCK)
    block_f = 32 if drops and wide_NF.element_size() > 2 else 128
    block_n = 32 if many(block_r, wide_NF.element_size()) else 64
    sums.launch(_outer)[(chunks, -(-features // block_f), width // block_r)](
        narrow_NW, wide_NF, parts, grad, tables.order_N, tables.chunks_C4, ranks_P2, *pointers(drops, 1, ranks_P2), features,
        WIDTH=width, BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_F=block_f, DROP=bool(drops), PRECISION=_precision(wide_NF.dtype),
        STAGES=_stages(block_n, block_f + block_r, wide_NF.element_size(), 0), num_warps=4, num_stages=1,
    )  # fmt: skip
    sums.fold_or_leave([grad], [parts], tables, [ranks_P2], later)
    return grad


def outer_and_shrink(
    narrow: Sequence[Tensor],
    wide: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """(`outer` of narrow and wide, `shrink` of wide by weight) of up to four layers; wide is read once where ranks are few."""
    width, entries = narrow[0].shape[1], wide[0].shape[0]
    layers = list(zip(narrow, wide, weights, ranks, scalings, strict=True))
    if width > ONE_PASS_WIDTH:
        narrowed = [shrink(dy, weight, tables, place, scaling, width) for _, dy, weight, place, scaling in layers]
        return [outer(xa, dy, weight, tables, place) for xa, dy, weight, place, _ in layers], narrowed
    chunks, device, item = tables.chunks_C4.shape[0], wide[0].device, wide[0].element_size()
    block_f, block_n = 256 if item == 2 else 64, 64
    grads, results, parts, shares = [], [], [], []
    for xa, dy, weight, place, _ in layers:
        features = dy.shape[1]
        columns = -(-features // block_f)
        grads.append(torch.empty_like(weight))
        results.append(torch.empty((entries, width), dtype=dy.dtype, device=device))
        parts.append(torch.empty((tables.summed, width, features), dtype=torch.float32, device=device))
        shares.append(torch.empty((columns, entries, width), dtype=torch.float32, device=device))
        sums.launch(_through)[(chunks, columns)](
            xa, dy, weight, parts[-1], shares[-1], grads[-1], tables.order_N, tables.chunks_C4, place, features, entries,
            WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, PRECISION=_precision(dy.dtype),
            STAGES=_stages(block_n, block_f + width, item, 0), num_warps=8, num_stages=1,
        )  # fmt: skip
    sums.fold(grads, parts, tables, ranks)
    sums.gather(results, shares, tables, ranks, scalings)
    return grads, results
