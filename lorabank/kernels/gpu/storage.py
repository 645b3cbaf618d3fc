"""The frozen product on a GPU, one pair of functions for each way a base weight is stored. One table: `STORAGES`.

Shapes: x (N, I), dy (N, O). `base` is the list of a storage's tensors; `linear`: [W (O, I)], `conv1d`: [W (I, O)].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """The two products of one storage. Each gives a fresh contiguous tensor, or adds to one in place where it can."""

    forward: Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]
    """(x (N, I), base, bias) → y (N, O)"""
    input_grad: Callable[[Tensor, Sequence[Tensor]], Tensor]
    """(dy (N, O), base) → dx (N, I)"""
    add_forward: Callable[[Tensor, Tensor, Sequence[Tensor]], None] | None = None
    """(y, x, base): y += W x in place, accumulated before it is rounded: one pass over y less than adding afterwards."""
    add_input_grad: Callable[[Tensor, Tensor, Sequence[Tensor]], None] | None = None
    """(dx, dy, base): dx += Wᵀ dy in place."""


_LIBRARY = torch.library.Library("lorabank", "FRAGMENT")
_LIBRARY.define("add_product(Tensor(a!) out, Tensor left, Tensor right) -> ()")


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(out, left, right, out=out)


# registered by hand rather than through `custom_op`, whose wrapper costs the host more than the call
for _backend in ("CPU", "CUDA"):
    _LIBRARY.impl("add_product", _add_product, _backend)
_LIBRARY.impl("add_product", lambda out, left, right: None, "Meta")


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, (N, F). An op of its own: as plain `addmm` a compiler would copy `out` first."""
    torch.ops.lorabank.add_product(out, left, right)


def _linear(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return F.linear(x, base[0], bias)


def _conv1d(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return x @ base[0] if bias is None else torch.addmm(bias, x, base[0])


STORAGES: Mapping[str, Storage] = {
    "linear": Storage(
        _linear,
        lambda dy, base: dy @ base[0],
        lambda y, x, base: add_product(y, x, base[0].t()),
        lambda dx, dy, base: add_product(dx, dy, base[0]),
    ),
    "conv1d": Storage(
        _conv1d,
        lambda dy, base: dy @ base[0].t(),
        lambda y, x, base: add_product(y, x, base[0]),
        lambda dx, dy, base: add_product(dx, dy, base[0].t()),
    ),
}
