"""A module's inputs and outputs by rows: what some of them get, and one output put together from several calls' outputs.

Shapes: N first dimension of the batch's tensors: the rows, or each row several times in turn where a module above folded them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabank.errors import RoutingError
from lorabank.kernels.tables import send

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)
_WAY = "Route all rows alike (bank.use(name), or bank.route(name)), or save a smaller module."


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input whose first dimension is the rows'."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def places(units: Sequence[int], each: int, device: torch.device) -> Tensor:
    """int64 indices in the first dimension of units that are `each` long."""
    first = torch.tensor([unit * each for unit in units], dtype=torch.int64)
    return send((first[:, None] + torch.arange(each)).reshape(-1), device)


def rows_of(value: Any, rows: Tensor, like: Tensor, path: str) -> Any:
    """An argument for some rows alone. `like`: the first tensor; others with as many rows are split, what is for all is not.

    Raises RoutingError for what can't be split: a cache, or a tensor that may have the rows or the tokens first.
    """
    if isinstance(value, Tensor):
        if value is like or (value.ndim and len(value) == len(like) > 1):
            tokens_too = value is not like and like.ndim > 2 and like.shape[1] == len(like)
            if tokens_too and value.ndim < 3 and value.shape != like.shape[:2]:
                raise RoutingError(
                    f"module {path!r} gets a tensor {tuple(value.shape)}, whose first dimension may be the rows or the tokens: "
                    f"there are {len(like)} of both. {_WAY}"
                )
            return value.index_select(0, rows)
        return value
    if type(value) in (tuple, list):
        return type(value)(rows_of(item, rows, like, path) for item in value)
    if type(value) is dict:
        return {key: rows_of(item, rows, like, path) for key, item in value.items()}
    if isinstance(value, _PLAIN):
        return value
    raise RoutingError(f"module {path!r} gets a {type(value).__name__}, which can't be split into rows. {_WAY}")


def put_together(parts: Sequence[Any], count: int, rows: Sequence[Tensor], path: str, *, whole: bool, widens: bool) -> Any:
    """One output of N rows from several, each of its own `rows`.

    whole: the first is of all rows, and the others' are put over it. widens: narrower ones are filled up with −inf in the last
    dimension. Raises RoutingError where the outputs aren't alike, or don't have the rows first.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        for part, mine in zip(parts, rows, strict=True):
            if not isinstance(part, Tensor) or not part.ndim or len(part) != len(mine):
                raise RoutingError(f"module {path!r} returns what doesn't have the rows first. {_WAY}")
        return _joined(_widened(parts) if widens else parts, count, rows, whole=whole)
    if isinstance(first, tuple | list):
        made = [put_together(items, count, rows, path, whole=whole, widens=widens) for items in zip(*parts, strict=True)]
        return type(first)(made) if type(first) in (tuple, list) else type(first)(*made)
    if isinstance(first, Mapping):
        build: Any = type(first)
        return build(
            {key: put_together([part[key] for part in parts], count, rows, path, whole=whole, widens=widens) for key in first}
        )
    if isinstance(first, _PLAIN) and all(part == first for part in parts):
        return first
    raise RoutingError(f"module {path!r} returns a {type(first).__name__}, which can't be split into rows. {_WAY}")


def changed(total: Any, base: Any, output: Any, weights: Tensor, path: str, rows: Tensor | None = None) -> Any:
    """total + weights · (output − base), where `rows` of total and base are the output's; None: all of it is.

    `weights`: one number, or one for each of the rows. Raises RoutingError where the outputs aren't alike.
    """
    if isinstance(base, Tensor):
        mine = base if rows is None else base.index_select(0, rows)
        if output.shape != mine.shape:
            raise RoutingError(
                f"module {path!r}: outputs of {output.shape[-1]} and {mine.shape[-1]} labels can't be mixed. Give each row one "
                "adapter."
            )
        change = weights.to(mine.device, mine.dtype).view(-1, *(1,) * (mine.ndim - 1)) * (output.to(mine.dtype) - mine)
        return total + change if rows is None else total.index_add(0, rows, change)
    if type(base) in (tuple, list):
        return type(base)(changed(t, b, o, weights, path, rows) for t, b, o in zip(total, base, output, strict=True))
    if isinstance(base, Mapping):
        build: Any = type(base)
        return build({key: changed(total[key], base[key], output[key], weights, path, rows) for key in base})
    if base is None:
        return None
    raise RoutingError(f"module {path!r} returns a {type(base).__name__}, which can't be mixed. Give each row one adapter.")


def _widened(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one width: the last dimension filled up with −inf, a label that is never chosen."""
    width = max(part.shape[-1] for part in parts)
    return [part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in parts]


def _joined(parts: Sequence[Tensor], count: int, rows: Sequence[Tensor], *, whole: bool) -> Tensor:
    parts = [part.to(parts[0].dtype) for part in parts]
    if whole:
        return parts[0] if len(parts) == 1 else parts[0].index_copy(0, torch.cat(list(rows[1:])), torch.cat(parts[1:]))
    order = torch.cat(list(rows))
    place = torch.empty(count, dtype=torch.int64, device=order.device).index_copy_(
        0, order, torch.arange(count, device=order.device)
    )
    return torch.cat(parts).index_select(0, place)
