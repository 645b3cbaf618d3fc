"""Sizes and dtypes at the edge of what the kernels take, on a GPU: odd sizes, high ranks, offsets beyond 2³¹, fp16, fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorabank import AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import compile_blocks, repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.step import Engine
from lorabank.kernels.tables import route_tables
from lorabank.notices import warn_once
from tests.engine.tiny import backward
from tests.gpu.laws import SEEN, assert_same, distance, mixed_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def nothing_said_before() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def bank_of(
    dtype: torch.dtype, ranks: tuple[int, int], *, heads: int = 4, dropout: float = 0.0, device: str = "cuda"
) -> AdapterBank:
    """Heads of 20 numbers, and no size that is a multiple of 16 but by chance."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=131,
        hidden_size=20 * heads,
        intermediate_size=92,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=20,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: nn.Module = hf.LlamaForCausalLM(config).eval()
    bank = attach(model.to(device, dtype))
    for i, (name, rank) in enumerate(zip("ab", ranks, strict=True)):
        bank.add(name, AdapterConfig(rank=rank, alpha=rank, dropout=dropout), seed=i)
        with torch.no_grad():
            for p in bank.parameters(name):
                p.add_((torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + i)) * 0.03).to(p))
    return bank


def fuse(model: nn.Module) -> None:
    compile_blocks(model)
    assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in repeated_blocks(model))


def check(plain: AdapterBank, fused: AdapterBank, tolerance: float, *, graphs: bool) -> None:
    batch, engine = mixed_batch(), Engine(fused, cuda_graphs=graphs)
    expected = backward(plain, batch, Engine(plain, cuda_graphs=False))
    for _ in range(SEEN):
        found = backward(fused, batch, engine)
    assert bool(engine.graphs._captured) == graphs
    assert_same(found, expected, tolerance)


@pytest.mark.parametrize("heads", [4, 6])
def test_odd_sizes(heads: int) -> None:
    plain, fused = (bank_of(torch.float32, (5, 3), heads=heads) for _ in range(2))
    fuse(fused.model)
    check(plain, fused, 1e-4, graphs=True)


@pytest.mark.filterwarnings("ignore:adapter .* rank .* is above what layer")
def test_a_rank_beyond_a_layers_sizes() -> None:
    plain, fused = (bank_of(torch.float32, (300, 70)) for _ in range(2))
    fuse(fused.model)
    check(plain, fused, 1e-4, graphs=True)


@pytest.mark.parametrize("ranks", [(5, 3), (24, 40)])
def test_an_fp16_base(ranks: tuple[int, int]) -> None:
    plain, fused = (bank_of(torch.float16, ranks) for _ in range(2))
    fuse(fused.model)
    check(plain, fused, 3e-2, graphs=False)  # whose loss scales change from pass to pass


def test_an_fp64_base_stays_uncompiled_and_trains() -> None:
    plain, fused = (bank_of(torch.float64, (5, 3)) for _ in range(2))
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM stay uncompiled, and steps slower: its numbers are torch.float64"):
        assert compile_blocks(fused.model) == []
    check(plain, fused, 1e-6, graphs=False)


@pytest.mark.filterwarnings("ignore:compile. LlamaDecoderLayer doesn't take dropout")
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_draws_the_same_in_compiled_blocks(recompute: bool) -> None:
    """Recomputation too: a GPU's backward runs in a thread of its own, which knows the route only if it was captured."""
    plain, fused = (bank_of(torch.float32, (5, 3), dropout=0.2) for _ in range(2))
    fuse(fused.model)
    batch = mixed_batch()
    for step in range(3):
        mine, theirs = (
            backward(bank, batch, Engine(bank, gradient_checkpointing=recompute), steps={"a": step, "b": 5 + step})
            for bank in (fused, plain)
        )
        assert_same(mine, theirs, 1e-4)


def test_autocast_runs_uncompiled() -> None:
    plain, fused = (bank_of(torch.float32, (5, 3)) for _ in range(2))
    fuse(fused.model)
    ids = torch.randint(3, 131, (4, 24), generator=torch.Generator().manual_seed(0)).to("cuda")
    found: list[Tensor] = []
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad(), pytest.warns(UserWarning, match="doesn't take autocast"):
        for bank in (plain, fused):
            with bank.route("b"):
                bank.model(ids, use_cache=False)  # every layer has been reached
                found.append(bank.model(ids, use_cache=False).logits)
    assert distance(found[1], found[0]) < 1e-2


def check_offsets(units: int, tokens: int, features: int, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """One adapted layer over units × tokens rows of `features` numbers: its last rows and the gradients, against torch."""
    from lorabank.kernels.gpu import op as _op  # noqa: F401  registers the op; imports Triton

    rows, rank, out = units * tokens, 8, 16
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    x, dy, weight = random(rows, features), random(rows, out), random(out, features) / features**0.5
    A, B = random(2 * rank, features, dtype=torch.float32) / features**0.5, random(2 * rank, out, dtype=torch.float32)
    ranks = torch.tensor([[rank, rank], *[[0, 0]] * 7], dtype=torch.int32, device=device)
    scaling = torch.tensor([0.5, *[0.0] * 7], device=device)
    tables = route_tables({0: range(units)}, units, tokens, 8).to(torch.device(device))
    x.requires_grad_()
    A.requires_grad_()
    B.requires_grad_()
    y, _ = torch.ops.lorabank.lora_linear(
        x, [weight], None, A, B, ranks, scaling, *tables.tensors, "linear", 16, []
    )  # fmt: skip
    y.backward(dy)
    assert x.grad is not None and A.grad is not None and B.grad is not None
    with torch.no_grad():
        a, b, w = A[rank:], B[rank:], weight.float()
        last, dlast = x[-64:].float(), dy[-64:].float()
        assert distance(y[-64:], last @ w.t() + 0.5 * (last @ a.t()) @ b) < tolerance
        assert distance(x.grad[-64:], dlast @ w + 0.5 * (dlast @ b.t()) @ a) < tolerance
        dA, dB = torch.zeros_like(a), torch.zeros_like(b)
        for part in range(0, rows, 8192):
            xs, dys = x[part : part + 8192].float(), dy[part : part + 8192].float()
            dA += 0.5 * (dys @ b.t()).t() @ xs
            dB += 0.5 * (xs @ a.t()).t() @ dys
        assert distance(A.grad[rank:], dA) < tolerance
        assert distance(B.grad[rank:], dB) < tolerance


def test_offsets_beyond_2_to_the_31() -> None:
    """140,000 × 16,384 numbers: 4.6 GB in bf16."""
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("takes 20 GB of a GPU's memory")
    check_offsets(140, 1000, 16384, "cuda", torch.bfloat16, 2e-2)
    torch.cuda.empty_cache()
