"""A batch in as few passes as memory allows: one that doesn't fit is halved, and what was learnt holds for the batches to come.

Losses and gradients are sums over rows, so parts of a batch add up to the whole of it, whatever their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from lorabank.engine.batch import Batch
from lorabank.engine.host_memory import WANTED
from lorabank.engine.model_batch import ModelBatch
from lorabank.errors import TooLargeError

_OTHERS = re.compile(
    r"_STATUS_(?:INTERNAL_ERROR_(?:DEVICE_|HOST_)?)?ALLOC(?:ATION)?_FAILED|\bCUDA(?: driver)?(?: error|\]): out of memory"
    r"|\bCUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate"
)
"""What libraries that take memory themselves say where they get none: torch passes it on as a RuntimeError of no kind."""
Rows = Sequence[int]
AnyBatch = TypeVar("AnyBatch", Batch, ModelBatch)
Compute = Callable[[AnyBatch, Rows], Tensor]
"""(part, its rows in the batch) → a tensor whose first dimension is those rows. Changes nothing where it raises."""


@dataclass
class Fits:
    """What a device's memory was found to hold."""

    tokens: int | None = None
    """Cost (of tokens: rows × length) of the largest pass that is still tried; None: memory never ran out."""
    times: int = 0
    """How often it ran out."""

    def in_parts(self, batch: AnyBatch, compute: Compute[AnyBatch], release: Callable[[], bool]) -> list[tuple[Rows, Tensor]]:
        """(rows, what `compute` made of them) for parts that together are the batch: one part, unless memory runs out.

        `release`: give memory back that isn't needed; True when that may have been enough. Raises TooLargeError when one row
        (with its reference, where it has one) doesn't fit.
        """
        waiting, found = [part for apart in _apart(batch) for part in _within(batch, apart, self.tokens)], []
        while waiting:
            groups = waiting.pop(0)
            rows = sorted(row for group in groups for row in group)
            part = batch if len(rows) == batch.rows else batch.select(rows)
            result = _attempt(compute, part, rows)
            if isinstance(result, Tensor):
                found.append((rows, result))
                continue
            if release():
                waiting.insert(0, groups)
                continue
            self.times += 1
            if len(groups) == 1:
                raise _too_large(part, result)
            half = (len(groups) + 1) // 2
            self.tokens = min(part.cost // 2, self.tokens or part.cost)
            waiting[:0] = [groups[:half], groups[half:]]
        return found


def _attempt(compute: Compute[AnyBatch], part: AnyBatch, rows: Rows) -> Tensor | str:
    """The result, or what torch says of the memory that it lacked. The failed pass's tensors are gone once this returns."""
    try:
        return compute(part, rows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return (str(error).splitlines() or [""])[0]


def capturing() -> bool:
    """Whether a CUDA graph is being captured. A torch that was built without CUDA raises where it is asked."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        return False


def stop_if_interrupted(error: Exception) -> None:
    """Raise KeyboardInterrupt where torch's compiler took one for a failure of its own."""
    if "KeyboardInterrupt" in str(error):
        raise KeyboardInterrupt from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory was too small: torch says so, or a library that it calls (cuBLAS, cuDNN, Triton, CUDA itself).

    Also where that stopped something else, such as torch's compiler.
    """
    met: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in met:
            continue
        if isinstance(one, torch.OutOfMemoryError) or (isinstance(one, RuntimeError) and _OTHERS.search(str(one))):
            return True
        met.append(one)
        inner = one.inner_exception if isinstance(one, BackendCompilerFailed) else None
        waiting += [inner, one.__cause__, one.__context__]
    return False


def whole(found: Sequence[tuple[Rows, Tensor]], rows: int) -> Tensor:
    """The parts' results in the batch's order."""
    if len(found) == 1:
        return found[0][1]
    order = torch.tensor([row for part, _ in found for row in part])
    place = torch.empty(rows, dtype=torch.int64)
    place[order] = torch.arange(rows)
    return torch.cat([result for _, result in found])[place.to(found[0][1].device)]


def _groups(batch: Batch | ModelBatch) -> list[list[int]]:
    """Rows that must stay together: each with the row that is its reference."""
    references = batch.references or (None,) * batch.rows
    served = {row for row in references if row is not None}
    return [[i] if r is None else [i, r] for i, r in enumerate(references) if i not in served]


def _apart(batch: Batch | ModelBatch) -> list[Sequence[Sequence[int]]]:
    """The rows in groups that stay together, by pass that they can share."""
    return [[[row] for row in rows] for rows in batch.groups] if isinstance(batch, ModelBatch) else [_groups(batch)]


def _within(batch: Batch | ModelBatch, groups: Sequence[Sequence[int]], tokens: int | None) -> list[Sequence[Sequence[int]]]:
    """The groups in parts of up to `tokens` padded tokens, in order; a group of more is a part of its own."""
    if tokens is None or batch.cost <= tokens:
        return [groups]
    parts: list[list[Sequence[int]]] = []
    rows = longest = 0
    for group in groups:
        length = max(batch.lengths[row] for row in group)
        if not parts or (rows + len(group)) * max(longest, length) > tokens:
            parts.append([])
            rows = longest = 0
        parts[-1].append(group)
        rows, longest = rows + len(group), max(longest, length)
    return list(parts)


def _too_large(part: Batch | ModelBatch, said: str) -> TooLargeError:
    if isinstance(part, ModelBatch):
        return TooLargeError(
            f"out of memory: one row alone doesn't fit ({said or 'on its device'}). Set gradient_checkpointing: true (a stopped "
            "run can be resumed with it), or start anew with smaller inputs or the base in bf16 (base_dtype)."
        )
    device = part.input_ids_NL.device
    way = "Set activation_offloading: true (a stopped run can be resumed with it), or start anew with the base in fewer bits "
    if WANTED in said:
        way = "Set activation_offloading: false where the GPU has room for it, or start anew with the base in fewer bits "
    return TooLargeError(
        f"out of memory: a row of {max(part.lengths)} tokens alone doesn't fit ({said or f'on {device}'}). "
        f"{way}(base_dtype: nf4) or shorter rows (data.max_length)."
    )
