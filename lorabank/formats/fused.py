"""Layers that a file has as one matrix and a model as several, such as Flux's q, k and v: taken apart and joined, exactly.

The rows of ΔW = B A are divided among the parts, so each takes its rows of B and, unless it has ranks to itself, all of A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer


@dataclass(frozen=True, kw_only=True)
class Whole:
    """One matrix of a file and the modules that its rows are of, in order."""

    paths: tuple[str, ...]
    swapped: bool = False
    """Whether the two halves of the rows change places."""


def take_apart(layer: AdapterLayer, paths: Sequence[str], *, swapped: bool = False) -> dict[str, AdapterLayer]:
    """The parts by module path. A part whose ranks no other uses gets those alone, and one that no rank reaches is left out.

    Raises AdapterFileError where the rows can't be divided: three parts are equal, a fourth takes what is left of
    (in, in, in, …) rows.
    """
    if swapped:
        layer = replace(layer, B=_swap(layer.B), magnitude=None if layer.magnitude is None else _swap(layer.magnitude))
    if len(paths) == 1:
        return {paths[0]: layer}
    heights = _heights(layer, paths)
    rows = layer.B.split(heights)
    magnitudes = [None] * len(paths) if layer.magnitude is None else list(layer.magnitude.split(heights))
    own = _own_ranks(rows) if layer.magnitude is None else None
    found: dict[str, AdapterLayer] = {}
    for index, path in enumerate(paths):
        A, B = layer.A, rows[index]
        if own is not None:
            begin, end = own[index]
            if begin == end:
                continue
            A, B = A[begin:end], B[:, begin:end]
        found[path] = replace(layer, A=A.clone(), B=B.clone(), magnitude=magnitudes[index], frozen_rank=0)
    return found


def join(whole: Whole, parts: Mapping[str, AdapterLayer]) -> AdapterLayer:
    """The one matrix of a file. Parts of one A keep it; others get ranks of their own, zero where they don't reach.

    Scalings that differ go into B, rounded in its dtype.
    """
    there = [parts[path] for path in whole.paths if path in parts]
    first = there[0]
    if len(whole.paths) == 1:
        joined = first
    else:
        heights = _heights_of(whole.paths, parts)
        scaling = first.scaling
        blocks = [
            parts[path].B if parts[path].scaling == scaling else parts[path].B * (parts[path].scaling / scaling)
            for path in whole.paths
            if path in parts
        ]
        shared = len(there) == len(whole.paths) and all(torch.equal(layer.A, first.A) for layer in there)
        magnitudes = [layer.magnitude for layer in there if layer.magnitude is not None]
        if shared:
            A, B = first.A, torch.cat(blocks)
        else:
            A = torch.cat([layer.A for layer in there])
            B = blocks[0].new_zeros(sum(heights), len(A))
            row = column = 0
            left = iter(blocks)
            for path, height in zip(whole.paths, heights, strict=True):
                if path in parts:
                    block = next(left)
                    B[row : row + height, column : column + block.shape[1]] = block
                    column += block.shape[1]
                row += height
        # α/r counts the joined rank, which `alpha_of` does from the scaling
        joined = replace(first, A=A, B=B, scaling=scaling, magnitude=torch.cat(magnitudes) if magnitudes else None, frozen_rank=0)
    if not whole.swapped:
        return joined
    return replace(joined, B=_swap(joined.B), magnitude=None if joined.magnitude is None else _swap(joined.magnitude))


def _swap(value: Tensor) -> Tensor:
    first, second = value.chunk(2)
    return torch.cat([second, first])


def _heights(layer: AdapterLayer, paths: Sequence[str]) -> list[int]:
    width, height = layer.size
    if len(paths) == 3:
        sizes = [height // 3] * 3
    else:
        sizes = [width] * (len(paths) - 1) + [height - width * (len(paths) - 1)]
    if sum(sizes) != height or min(sizes) < 1:
        raise AdapterFileError(
            f"layer {paths[0]!r} and its neighbours are one matrix of {len(paths)} parts, whose {height} rows can't be divided so"
        )
    return sizes


def _heights_of(paths: Sequence[str], parts: Mapping[str, AdapterLayer]) -> list[int]:
    """Rows of each part; an absent one is as high as its neighbours of three, and 4 · in of the MLP."""
    there = [parts[path] for path in paths if path in parts]
    width = there[0].size[0]
    usual = [there[0].size[1]] * 3 if len(paths) == 3 else [width, width, width, 4 * width]
    return [parts[path].size[1] if path in parts else size for path, size in zip(paths, usual, strict=True)]


def _own_ranks(rows: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Where each part's own ranks begin and end, where every rank is one part's and they lie in the parts' order."""
    begin, found = 0, list[tuple[int, int]]()
    used = torch.stack([block.ne(0).any(0) for block in rows])  # parts × ranks
    if not bool((used.sum(0) == 1).all()):
        return None
    for part in used:
        count = int(part.sum())
        if not bool(part[begin : begin + count].all()):
            return None
        found.append((begin, begin + count))
        begin += count
    return found
