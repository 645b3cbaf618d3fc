"""The linear maps that carry an adapter, as a narrow map and one that widens again: `shrink` to R numbers a place, `expand` to O.

An adapter's change of any frozen linear map is `expand(shrink(x, A), B)`: what differs is what the map's places are.

  - `LinearMap`: a place is a token; A (R, in), B (R, out).
  - `ConvMap`: a place is a position of the output; A (R, in/groups · k · k), B (R, out). ΔW = B·A seen as (out, in/groups, k, k),
    which merges exactly: a narrow convolution like the base's, then a 1 × 1 one. A is shared by the groups.
  - `EmbeddingMap`: a place is an id; A (R, ids), B (R, features), a look-up and then a product.

Both steps of each map are plain differentiable torch, which is what reference.py is made of; the backward steps beside them are
for mapped.py, which saves less. Shapes: N samples, C channels, R ranks, O outputs; `*S` and `*P` positions of input and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.segments import DropoutDraw, dropout_mask

SAMPLES = 4
"""Tokens or ids that a layer is tried on."""


class LowRankMap(Protocol):
    """What a product with an adapter needs to know of its layer."""

    def shape(self, delta_OI: Tensor) -> Tensor:
        """ΔW in the shape of the layer's weight."""
        ...

    def flat(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (O, I)."""
        ...

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """An input to try the layer on; `size` is A's second dimension."""
        ...

    def whole(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """The layer's own product, without its bias."""
        ...

    def shrink(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """The narrow product."""
        ...

    def expand(self, shrunk: Tensor, B_RO: Tensor) -> Tensor:
        """The change of the layer's output."""
        ...

    def shrink_backward(
        self, d_shrunk: Tensor, x: Tensor, A_RI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dA), those of them that `needs` names."""
        ...

    def expand_backward(self, dy: Tensor, shrunk: Tensor, B_RO: Tensor, needs_B: bool) -> tuple[Tensor, Tensor | None]:
        """(d_shrunk, dB)."""
        ...

    def in_one(self, rank: int, outputs: int) -> bool:
        """Whether the change is cheaper as one product with ΔW (`whole`) than as a narrow one and a wide one."""
        ...

    def whole_backward(
        self, dy: Tensor, x: Tensor, weight_OI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, d_weight (O, I)) of `whole`, for a map that is ever cheaper so."""
        ...

    def outputs(self, vector_O: Tensor, y: Tensor) -> Tensor:
        """A number for each output, such as the bias, in a shape that goes with y."""
        ...

    def over_places(self, y: Tensor) -> Tensor:
        """Sums over all but the outputs, (O,)."""
        ...

    def dropout(self, draw: DropoutDraw, x: Tensor) -> Tensor | None:
        """What x (U, N, …) is multiplied by, fp32; None for a map whose input is nothing to multiply."""
        ...


class _OutputsLast:
    """What maps share whose outputs are the last dimension of y."""

    def in_one(self, rank: int, outputs: int) -> bool:
        """Never: ΔW is as large as the layer."""
        return False

    def whole_backward(
        self, dy: Tensor, x: Tensor, weight_OI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Nobody asks."""
        raise NotImplementedError

    def expand(self, shrunk: Tensor, B_RO: Tensor) -> Tensor:
        """(…, O)."""
        return shrunk @ B_RO

    def expand_backward(self, dy: Tensor, shrunk: Tensor, B_RO: Tensor, needs_B: bool) -> tuple[Tensor, Tensor | None]:
        """(d_shrunk, dB)."""
        return dy @ B_RO.t(), shrunk.flatten(0, -2).t() @ dy.flatten(0, -2) if needs_B else None

    def outputs(self, vector_O: Tensor, y: Tensor) -> Tensor:
        """(O,)."""
        return vector_O

    def over_places(self, y: Tensor) -> Tensor:
        """(O,)."""
        return y.flatten(0, -2).sum(0)


@dataclass(frozen=True)
class LinearMap(_OutputsLast):
    """x (…, in) → (…, out)."""

    transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2's `Conv1D` has it."""

    def shape(self, delta_OI: Tensor) -> Tensor:
        """(out, in), or turned."""
        return delta_OI.t() if self.transposed else delta_OI

    def flat(self, weight: Tensor) -> Tensor:
        """(out, in)."""
        return weight.t() if self.transposed else weight

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """A few tokens."""
        return torch.randn(SAMPLES, size, generator=generator)

    def whole(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """(…, O)."""
        return x @ weight_OI.t()

    def shrink(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """(…, R)."""
        return x @ A_RI.t()

    def shrink_backward(
        self, d_shrunk: Tensor, x: Tensor, A_RI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dA)."""
        return d_shrunk @ A_RI if needs[0] else None, d_shrunk.flatten(0, -2).t() @ x.flatten(0, -2) if needs[1] else None

    def dropout(self, draw: DropoutDraw, x: Tensor) -> Tensor | None:
        """A number for each token and feature."""
        return dropout_mask(draw, prod(x.shape[1:-1]), x.shape[-1]).view(x.shape)


@dataclass(frozen=True)
class ConvMap:
    """x (N, C, *S) → (N, O, *P): a convolution in one to three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: int
    """Of the input."""
    pads: tuple[int, ...] = ()
    """What the input is padded by first, as `F.pad` takes it, where `padding` can't say it."""
    mode: str = "constant"
    """How that is filled."""

    def shape(self, delta_OI: Tensor) -> Tensor:
        """(out, in/groups, *kernel)."""
        return delta_OI.reshape(len(delta_OI), -1, *self.kernel)

    def flat(self, weight: Tensor) -> Tensor:
        """(out, in/groups · k · k)."""
        return weight.flatten(1)

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """One sample with two positions to a side at least."""
        reach = [d * (k - 1) + 1 + s for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)]
        sides = [max(side, *self.pads, 0) + 1 for side in reach]
        return torch.randn(1, size // prod(self.kernel) * self.groups, *sides, generator=generator)

    def whole(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """(N, O, *P)."""
        return self._conv(self._padded(x), self.shape(weight_OI), self.stride, self.padding, self.dilation)

    def in_one(self, rank: int, outputs: int) -> bool:
        """Of a convolution in groups the narrow product has groups · R channels: of a depthwise one R times as many as y."""
        taps = prod(self.kernel) * (self.channels // self.groups)
        return self.groups > 1 and outputs * taps <= rank * (self.groups * taps + outputs)

    def whole_backward(
        self, dy: Tensor, x: Tensor, weight_OI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, d_weight)."""
        dx, d_weight = self._from_padded(dy, x, self.shape(weight_OI), needs)
        return dx, None if d_weight is None else self.flat(d_weight)

    @property
    def pointwise(self) -> bool:
        """Whether each place of the output is of one place of the input, the same, and of all its channels."""
        ones = all(size == 1 for size in (*self.kernel, *self.stride, self.groups))
        return ones and not any(self.padding) and not self.pads

    def size_of(self, x: Tensor) -> tuple[int, ...]:
        """*P for an input that needs no padding beside the convolution's own."""
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((side + 2 * pad - d * (k - 1) - 1) // step + 1 for side, k, step, pad, d in sizes)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer itself, (N, O, *P)."""
        return self._conv(self._padded(x), weight, self.stride, self.padding, self.dilation, bias)

    def input_grad(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """dx of the layer itself."""
        return self._from_padded(dy, x, weight, (True, False))[0]

    def shrink(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """(N, groups · R, *P)."""
        return self._conv(self._padded(x), self._down(A_RI), self.stride, self.padding, self.dilation)

    def expand(self, shrunk: Tensor, B_RO: Tensor) -> Tensor:
        """(N, O, *P)."""
        one = (1,) * len(self.kernel)
        return self._conv(shrunk, self._up(B_RO), one, (0,) * len(one), one)

    def shrink_backward(
        self, d_shrunk: Tensor, x: Tensor, A_RI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dA)."""
        dx, dA = self._from_padded(d_shrunk, x, self._down(A_RI), needs)
        return dx, None if dA is None else dA.reshape(self.groups, *A_RI.shape).sum(0)

    def _from_padded(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, d_weight) of a convolution like the base's."""
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            padded = self._padded(inner)
        dx, d_weight = self._backward(dy, padded.detach(), weight, self.stride, self.padding, self.dilation, needs)
        if self.pads and dx is not None:
            (dx,) = torch.autograd.grad(padded, inner, dx)
        return dx, d_weight

    def expand_backward(self, dy: Tensor, shrunk: Tensor, B_RO: Tensor, needs_B: bool) -> tuple[Tensor, Tensor | None]:
        """(d_shrunk, dB)."""
        one = (1,) * len(self.kernel)
        dh, dB = self._backward(dy, shrunk, self._up(B_RO), one, (0,) * len(one), one, (True, needs_B))
        assert dh is not None
        return dh, None if dB is None else dB.reshape(dB.shape[:2]).t()

    def outputs(self, vector_O: Tensor, y: Tensor) -> Tensor:
        """(O, 1, …)."""
        return vector_O.view(-1, *(1,) * len(self.kernel))

    def over_places(self, y: Tensor) -> Tensor:
        """(O,)."""
        return y.sum([0, *range(2, y.ndim)])

    def dropout(self, draw: DropoutDraw, x: Tensor) -> Tensor | None:
        """A number for each position and channel; a position counts as a token."""
        units, samples, channels, *size = x.shape
        return dropout_mask(draw, samples * prod(size), channels).view(units, samples, *size, channels).movedim(-1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode=self.mode) if self.pads else x

    def _down(self, A_RI: Tensor) -> Tensor:
        """(groups · R, in/groups, *kernel): the same for each group."""
        return A_RI.view(len(A_RI), -1, *self.kernel).repeat(self.groups, 1, *(1,) * len(self.kernel))

    def _up(self, B_RO: Tensor) -> Tensor:
        """(O, R, 1, …)."""
        return B_RO.t().reshape(*B_RO.shape[::-1], *(1,) * len(self.kernel))

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        bias: Tensor | None = None,
    ) -> Tensor:
        zero = [0] * len(stride)
        return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, zero, self.groups)

    def _backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        if not any(needs):
            return None, None
        zero = [0] * len(stride)
        dx, d_weight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, zero, self.groups, [*needs, False]
        )
        return dx, d_weight


@dataclass(frozen=True)
class EmbeddingMap(_OutputsLast):
    """x (…) ids → (…, O)."""

    padding_id: int | None = None
    """An id that isn't trained."""

    def shape(self, delta_OI: Tensor) -> Tensor:
        """(ids, features)."""
        return delta_OI.t()

    def flat(self, weight: Tensor) -> Tensor:
        """(features, ids)."""
        return weight.t()

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """A few ids."""
        return torch.randint(size, (SAMPLES,), generator=generator)

    def whole(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """(…, O)."""
        return F.embedding(x, weight_OI.t())

    def shrink(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """(…, R)."""
        return F.embedding(x, A_RI.t(), padding_idx=self.padding_id)

    def shrink_backward(
        self, d_shrunk: Tensor, x: Tensor, A_RI: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(None, dA): ids have no gradient."""
        if not needs[1]:
            return None, None
        places = x.reshape(-1)
        values = d_shrunk.reshape(-1, len(A_RI))
        if self.padding_id is not None:
            values = values * (places != self.padding_id)[:, None]
        return None, torch.zeros_like(A_RI.t(), memory_format=torch.contiguous_format).index_add_(0, places, values).t()

    def dropout(self, draw: DropoutDraw, x: Tensor) -> Tensor | None:
        """Nothing is dropped: an id is no number (PEFT drops nothing there either)."""
        return None
