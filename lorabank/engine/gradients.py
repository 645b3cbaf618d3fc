"""Gradients of one pass kept apart from what the leaves hold already, until the pass is through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def fresh_gradients(leaves: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the leaves have no gradient; what they get there is added to what they had.

    Where the code inside raises, every leaf has its old gradient again: a pass that ran out of memory can be tried anew.
    """
    before = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    except BaseException:
        for leaf in leaves:
            leaf.grad = None
        for leaf, gradient in before:
            leaf.grad = gradient
        raise
    add(before)


def copied(leaves: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Each leaf and a copy of its gradient, for `put_back`."""
    return [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in leaves]


def put_back(gradients: Sequence[tuple[nn.Parameter, Tensor | None]]) -> None:
    """Give leaves the gradients that `copied` took."""
    for leaf, gradient in gradients:
        leaf.grad = gradient


def add(before: Sequence[tuple[nn.Parameter, Tensor | None]]) -> None:
    """Put back gradients that leaves had before a pass, what the pass gave added to them."""
    both = [(leaf, old, leaf.grad) for leaf, old in before if old is not None and leaf.grad is not None]
    if both:
        torch._foreach_add_([o for _, o, _ in both], [n for _, _, n in both])  # pyright: ignore[reportPrivateImportUsage]
    for leaf, old in before:
        leaf.grad = old


def leaves_of(loss: Tensor) -> list[nn.Parameter]:
    """All that backward gives a gradient, each once."""
    waiting, met, found = [loss.grad_fn], set[Any](), dict[int, Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in met:
            met.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found[id(leaf)] = leaf
            waiting += [following for following, _ in node.next_functions]
    return list(found.values())
