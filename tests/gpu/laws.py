"""What the laws' tests on a GPU share: a model, a bank over it with compiled blocks, passes and what they are held against.

Everything takes its device, dtype and way of compiling from a `Setting`, so that it runs on a CPU too (through the interpreter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine.batch import Batch
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.step import Engine, SlotLoss
from tests.engine.tiny import backward, batch_of, difference

MIXED: Sequence[RowRoute] = ["a", "b", BASE, "a"]
LENGTHS = (24, 17, 20, 9)
SEEN = 4
"""Passes after which one of the same shape comes from a graph: see engine/graphs.py."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Of losses, relative; of gradients as `difference` has it. fp32 reorders sums, bf16 rounds activations to 8 bits."""
SAME_SHAPE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
"""The same where the batch has the same shape: only the order of atomic additions is left."""

Pass = tuple[Mapping[str, SlotLoss], Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how the laws are tried."""

    dtype: torch.dtype
    graphs: bool
    """Passes that come again are captured as CUDA graphs."""
    fuse: Callable[[nn.Module], object]
    device: str = "cuda"
    ranks: Mapping[str, int] = field(default_factory=lambda: {"a": 4, "b": 11})
    """Of the adapters, for laws that don't ask for others."""

    @property
    def tolerance(self) -> float:
        """Of losses and gradients."""
        return TOLERANCE[self.dtype]

    @property
    def same_shape(self) -> float:
        """Of losses and gradients of passes of the same shape."""
        return SAME_SHAPE[self.dtype]

    def model(self) -> nn.Module:
        """The base: the same each time."""
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model: nn.Module = hf.LlamaForCausalLM(config).eval()
        return model.to(self.device, self.dtype)

    def bank(self, ranks: Mapping[str, int] | None = None, *, filled: bool = True, **config: Any) -> AdapterBank:
        """Compiled blocks under a bank with adapters `a` and `b`, or those of `ranks`, that do something."""
        bank = attach(self.model())
        for name, rank in (self.ranks if ranks is None else ranks).items():
            add(bank, name, rank, filled=filled, **config)
        self.compile(bank.model)
        if bank.names:
            self.reach(bank)
        return bank

    def compile(self, model: nn.Module) -> None:
        """Compile the blocks, all of them."""
        self.fuse(model)
        assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in repeated_blocks(model))

    def reach(self, bank: AdapterBank) -> None:
        """Show that the model reaches every adapted layer, after which its blocks run compiled."""
        with torch.no_grad(), bank.route(BASE):
            bank.model(torch.ones(1, 3, dtype=torch.int64, device=self.device))

    def engine(self, bank: AdapterBank, **settings: Any) -> Engine:
        """The verbs over a bank."""
        return Engine(bank, cuda_graphs=self.graphs, **settings)

    def ids(self, rows: int = 4) -> Tensor:
        """Tokens of a pass without gradients, long enough to run compiled."""
        return torch.randint(14, 61, (rows, 24), generator=torch.Generator().manual_seed(3)).to(self.device)

    def logits(self, bank: AdapterBank, route: Any) -> Tensor:
        """fp32 logits of `ids()` under a route."""
        with torch.no_grad(), bank.route(route):
            return bank.model(self.ids(), use_cache=False).logits.float()

    def settled(self, bank: AdapterBank, batch: Batch, engine: Engine, **kwargs: Any) -> Pass:
        """Losses and fresh gradients of a pass; with graphs, of one that is replayed."""
        for _ in range(SEEN if self.graphs else 1):
            found = backward(bank, batch, engine, **kwargs)
        assert engine.graphs.refused is None
        assert bool(engine.graphs._captured) == self.graphs
        return found


def add(bank: AdapterBank, name: str, rank: int, *, filled: bool = True, **config: Any) -> None:
    """An adapter whose values depend on its name alone: fresh, or `filled` so that it does something."""
    seed = sum(name.encode())
    bank.add(name, AdapterConfig(rank=rank, alpha=16, **config), seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters(name) if filled else ():
            p.add_(torch.randn(p.shape, generator=g).to(p.device) * 0.05)


def assert_same(mine: Pass, theirs: Pass, tolerance: float) -> None:
    """Losses, each row's too, and all gradients."""
    assert mine[0].keys() == theirs[0].keys()
    for name, loss in theirs[0].items():
        assert mine[0][name].tokens == loss.tokens
        expected = list(loss.row_losses.values())  # without their places: a part of a batch numbers its rows anew
        assert list(mine[0][name].row_losses.values()) == pytest.approx(expected, rel=tolerance), name
        assert difference(mine[1][name], theirs[1][name]) < tolerance, name


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, over all numbers."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def content(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The bytes of tensors on any device."""
    return {key: t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for key, t in tensors.items()}


def mixed_batch(routes: Sequence[RowRoute] = MIXED, *, seed: int = 0) -> Batch:
    """Rows of different lengths."""
    return batch_of(LENGTHS, routes, seed=seed)
