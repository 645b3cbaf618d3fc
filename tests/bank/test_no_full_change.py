"""Training makes no tensor as large as a weight, so no B A of a whole layer, a kernel or an expert, and no identity matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MixtralConfig, MixtralForCausalLM

from lorabank import BASE, AdapterConfig, attach
from tests.bank.tiny import VOCABULARY, fill, ids, outputs


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes; views and what is written in place are no new ones."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before]
        self.numbers = max(self.numbers, *(t.numel() for t in new), 0)
        return made


def _experts() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=3, **sizes))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int, dict[str, Any]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(256, 256)), lambda: torch.randn(4, 256), 256 * 256, {}),
    "decomposed linear": (lambda: nn.Sequential(nn.Linear(256, 256)), lambda: torch.randn(4, 256), 256 * 256, {"use_dora": True}),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(64, 64, 3)),
        lambda: torch.randn(4, 64, 5, 5),
        64 * 64 * 9,
        {"targets": "all-conv"},
    ),
    "decomposed convolution": (
        lambda: nn.Sequential(nn.Conv2d(64, 64, 3)),
        lambda: torch.randn(4, 64, 5, 5),
        64 * 64 * 9,
        {"targets": "all-conv", "use_dora": True},
    ),
    "convolution in groups": (
        lambda: nn.Sequential(nn.Conv2d(256, 256, 3, groups=8, dilation=2)),
        lambda: torch.randn(4, 256, 5, 5),
        256 * 32 * 9,
        {"targets": "all-conv"},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(1024, 64)),
        lambda: ids(4),
        1024 * 64,
        {"targets": "all-embedding"},
    ),
    "decomposed embedding": (
        lambda: nn.Sequential(nn.Embedding(1024, 64)),
        lambda: ids(4),
        1024 * 64,
        {"targets": "all-embedding", "use_dora": True},
    ),
    "experts": (_experts, lambda: ids(4), 256 * 256, {"targets": "experts"}),
}
"""Model, its input, the numbers of the smallest weight that is adapted, settings."""


@pytest.mark.parametrize("case", CASES)
def test_nothing_as_large_as_a_weight_is_made(case: str) -> None:
    torch.manual_seed(0)
    make, example, size, settings = CASES[case]
    model, x = make().eval(), example()
    bank = attach(model)
    for name in ("a", "b"):
        bank.add(name, AdapterConfig(rank=2, **settings))
        fill(bank, name)
    with Largest() as largest:
        with bank.route(["a", "b", BASE, "a"]):
            y = outputs(model, x) if case == "experts" else model(x)
        y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.parameters())
    assert largest.numbers < size


def test_a_change_in_full_would_be_found() -> None:
    A, B = torch.randn(2, 256), torch.randn(256, 2)
    with Largest() as largest:
        B @ A
    assert largest.numbers == 256 * 256
