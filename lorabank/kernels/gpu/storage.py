"""The frozen product on a GPU, one pair of functions for each way a base weight is stored. One table: `STORAGES`.

Shapes: x (N, I), dy (N, O). `base` is the list of a storage's tensors; `linear`: [W (O, I)], `bordered:…`: W and what
bordered_op.py has besides (its border before W, behind it, or below), `joined:i/C`: W, the i-th of C, and what joined_op.py
has besides, `conv1d`: [W (I, O)], `fp8`: as in kernels/fp8.py, `nf4`
and `fp4`: as in kernels/four_bit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels import four_bit, fp8


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
_LIBRARY.define("four_bit_product(Tensor x, Tensor[] base, str quant_type, bool turned) -> Tensor")
_LIBRARY.define("add_four_bit(Tensor(a!) out, Tensor x, Tensor[] base, str quant_type, bool turned) -> ()")


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(out, left, right, out=out)


def _add_four_bit(out: Tensor, x: Tensor, base: Sequence[Tensor], quant_type: str, turned: bool) -> None:
    shape = (x.shape[1], out.shape[1]) if turned else (out.shape[1], x.shape[1])
    weight_OI = four_bit.dequantize(base, quant_type, shape, x.dtype)
    torch.addmm(out, x, weight_OI if turned else weight_OI.t(), out=out)


def _four_bit_product(x: Tensor, base: Sequence[Tensor], quant_type: str, turned: bool) -> Tensor:
    shape = (x.shape[1], -1) if turned else (-1, x.shape[1])
    weight_OI = four_bit.dequantize(base, quant_type, shape, x.dtype)
    return x @ (weight_OI if turned else weight_OI.t())


def _four_bit_shape(x: Tensor, base: Sequence[Tensor], quant_type: str, turned: bool) -> Tensor:
    return x.new_empty(x.shape[0], 2 * base[0].numel() // x.shape[1])


# registered by hand rather than through `custom_op`, whose wrapper costs the host more than the call
for _backend in ("CPU", "CUDA"):
    _LIBRARY.impl("add_product", _add_product, _backend)
    _LIBRARY.impl("add_four_bit", _add_four_bit, _backend)
    _LIBRARY.impl("four_bit_product", _four_bit_product, _backend)
_LIBRARY.impl("add_product", lambda out, left, right: None, "Meta")
_LIBRARY.impl("add_four_bit", lambda out, x, base, quant_type, turned: None, "Meta")
_LIBRARY.impl("four_bit_product", _four_bit_shape, "Meta")


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, (N, F). An op of its own: as plain `addmm` a compiler would copy `out` first."""
    torch.ops.lorabank.add_product(out, left, right)


def four_bit_product(x: Tensor, base: Sequence[Tensor], quant_type: str, *, turned: bool) -> Tensor:
    """x Wᵀ, or x W where `turned`. One op that also frees W: a compiler that saw W would keep it for backward."""
    return torch.ops.lorabank.four_bit_product(x, list(base), quant_type, turned)


def add_four_bit(out: Tensor, x: Tensor, base: Sequence[Tensor], quant_type: str, *, turned: bool) -> None:
    """The same, added to `out` in place."""
    torch.ops.lorabank.add_four_bit(out, x, list(base), quant_type, turned)


def _linear(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return F.linear(x, base[0], bias)


def _conv1d(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return x @ base[0] if bias is None else torch.addmm(bias, x, base[0])


def _four_bit(quant_type: str) -> Storage:
    def forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        y = four_bit_product(x, base, quant_type, turned=False)
        return y if bias is None else y + bias.to(y.dtype)

    return Storage(
        forward,
        lambda dy, base: four_bit_product(dy, base, quant_type, turned=True),
        lambda y, x, base: add_four_bit(y, x, base, quant_type, turned=False),
        lambda dx, dy, base: add_four_bit(dx, dy, base, quant_type, turned=True),
    )


_PLAIN = Storage(
    _linear,
    lambda dy, base: dy @ base[0],
    lambda y, x, base: add_product(y, x, base[0].t()),
    lambda dx, dy, base: add_product(dx, dy, base[0]),
)

STORAGES: Mapping[str, Storage] = {
    "linear": _PLAIN,
    "bordered:before": _PLAIN,
    "bordered:behind": _PLAIN,
    "bordered:below": _PLAIN,
    **{f"joined:{which}/{count}": _PLAIN for count in range(1, 5) for which in range(count)},
    "conv1d": Storage(
        _conv1d,
        lambda dy, base: dy @ base[0].t(),
        lambda y, x, base: add_product(y, x, base[0]),
        lambda dx, dy, base: add_product(dx, dy, base[0].t()),
    ),
    "fp8": Storage(fp8.forward, fp8.input_grad),
    "nf4": _four_bit("nf4"),
    "fp4": _four_bit("fp4"),
}
