"""Softmax cross-entropy over a chunk of logits on a GPU: log-probabilities out, the gradient written over the logits.

Its plain twin is `plain_chunk` in lorabank/kernels/loss.py; both are held to reference.py.
Shapes: C tokens of a chunk, H hidden features, V vocabulary entries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import fast_math
from lorabank.kernels.logit_shape import LogitShape

CHUNK_NUMBERS = 2**27
"""Logits held at once, 256 MiB in bf16: 1,024 tokens of a vocabulary of 128k, enough for the products to fill an H100."""
CHUNK_MULTIPLE = 128
"""Tokens of a chunk come in multiples of this where they can: the height of a tile of the product."""
BLOCK = 32768
"""Logits of a row that a program looks at together, at most."""
WARPS = 32
"""Of a program. Wide, so that one row a multiprocessor is in flight and a row's second reading still finds it in the L2 cache."""


@triton.jit
def _softmax_kernel(
    logits_CV,
    targets_C,
    weights_C,
    logprobs_C,
    stride,
    V,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. Reads it once for the maximum and the sum, and where WRITE once more to put the gradient over it."""
    row = tl.program_id(0).to(tl.int64)  # times V it may pass 2³¹
    logits = logits_CV + row * stride
    cols = tl.arange(0, BLOCK)
    target = tl.load(targets_C + row)
    known = (target >= 0) & (target < V)
    # read before anything is written: the reductions below make every thread of the program wait for this load
    target_logit = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)

    # the lowest finite number, not −∞: a block that is all −∞ then adds 0, where (−∞) − (−∞) would be NaN
    top = -3.4028234663852886e38
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + cols, mask=start + cols < V, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(fast_math.exp(x - higher), 0)  # a NaN comes through here
        top = higher
    # in this order a common offset of all logits cancels before anything is rounded
    tl.store(logprobs_C + row, (target_logit - top) - tl.log(total))

    if WRITE:
        weight = tl.load(weights_C + row).to(tl.float32)
        idle = weight == 0.0  # exact zeros then, whatever the logits hold
        weight = tl.where(known, weight, float("nan"))
        share = 1.0 / total
        for start in range(0, V, BLOCK):
            inside = start + cols < V
            x = tl.load(logits + start + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            p = fast_math.exp(x - top) * share
            gradient = weight * tl.where(start + cols == target, p - 1.0, p)
            gradient = tl.where(idle, 0.0, gradient)
            tl.store(logits + start + cols, gradient.to(logits_CV.dtype.element_ty), mask=inside)


def softmax_(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor | None = None, *, block: int = BLOCK) -> Tensor:
    """log p(target), fp32 (C,). Weights have weight · (p − onehot(target)) written over the logits; without, they are only read.

    Logits in bf16, fp16 or fp32, columns next to each other. A row whose target is no column gives NaN, for its gradient
    too; one of weight 0 has a gradient of exact zeros. Nothing waits for the GPU.
    """
    tokens, vocabulary = logits_CV.shape
    logprobs = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    if not tokens:
        return logprobs
    with torch.cuda.device_of(logits_CV):  # Triton launches on the current GPU
        launch: Any = _softmax_kernel[(tokens,)]  # its options aren't in Triton's types
        launch(
            logits_CV,
            targets_C.contiguous(),
            logprobs if weights_C is None else weights_C.contiguous(),  # unused in the first case
            logprobs,
            logits_CV.stride(0),
            vocabulary,
            WRITE=weights_C is not None,
            BLOCK=min(block, triton.next_power_of_2(vocabulary)),
            num_warps=WARPS,
        )
    return logprobs


def chunk(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    scale_C: Tensor | None,
    shape: LogitShape | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log p(target) (C,), scale · d(−log p)/d hidden (C, H) in the weight's dtype); no gradient without `scale_C`."""
    logits, bend = F.linear(hidden_CH.to(weight_VH.dtype), weight_VH, bias_V), None
    if shape is not None:
        logits = shape(logits)
        if scale_C is not None:
            bend, scale_C = shape.bend(logits), scale_C * shape.slope
    logprobs = softmax_(logits, targets_C, scale_C)
    if scale_C is None:
        return logprobs, None
    if bend is not None:
        logits.mul_(bend.nan_to_num_(0.0))  # a row of weight 0 has exact zeros, and another NaN as it is
    return logprobs, logits.to(weight_VH.dtype) @ weight_VH
