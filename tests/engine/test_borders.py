"""Gated MLPs with borders inside fused blocks: what becomes of the model's weights, and that results stay those of plain blocks.

On a CPU through Triton's interpreter; the kernels themselves are in tests/kernels/gpu/test_bordered.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.engine.border_groups import gated_mlps, joined_layers
from lorabank.engine.compiled import fused_blocks
from lorabank.engine.compiling import repeated_blocks, uncompile_blocks
from lorabank.kernels.gpu import bordered
from lorabank.kernels.tables import RouteTables
from lorabank.notices import warn_once
from tests.engine import test_fused_block as fused_tests
from tests.engine.test_fused_block import assert_same, bank_of, fuse, pair
from tests.engine.tiny import add, backward, batch_of, make_bank, make_model

pytestmark = fused_tests.pytestmark
one_thread_and_shared_code, torch_attention = fused_tests.one_thread_and_shared_code, fused_tests.torch_attention
MLP = ["gate_proj", "up_proj", "down_proj"]
LENGTHS, ROUTES = [9, 7, 5, 8], ["a", "b", BASE, "a"]


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each pass over a narrow side: two a gated MLP's forward and backward."""
    seen: list[int] = []
    real = bordered.Group.widen

    def counted(group: bordered.Group, x: Tensor, tables: RouteTables) -> tuple[Tensor, list[Tensor]]:
        seen.append(len(group.ranks))
        return real(group, x, tables)

    monkeypatch.setattr(bordered.Group, "widen", counted)
    yield seen


def weights(bank: AdapterBank) -> dict[str, Tensor]:
    """The base's, by name."""
    return {name: p for name, p in bank.model.named_parameters() if ".lora." not in name}


def moved(bank: AdapterBank) -> set[str]:
    """Names, in their block, of weights that aren't tensors of their own."""
    return {
        name.split(".")[-2] for name, p in weights(bank).items() if p.untyped_storage().nbytes() > p.numel() * p.element_size()
    }


def settle(bank: AdapterBank) -> tuple[object, object]:
    """A pass, behind the first, which runs plainly."""
    backward(bank, batch_of(LENGTHS, ROUTES))
    return backward(bank, batch_of(LENGTHS, ROUTES))


@pytest.mark.variants(1)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pass_equals_that_of_plain_blocks(family: str, widened: list[int]) -> None:
    plain, fused = pair(family, targets=MLP)
    before = {name: p.detach().clone() for name, p in weights(fused).items()}
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert widened == [2, 2, 1, 1] * 2
    assert moved(fused) == set(MLP)
    assert all(torch.equal(p, before[name]) for name, p in weights(fused).items())
    saved = fused.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in saved.values())  # law 8: no adapter beside it


def test_uncompiled_blocks_have_their_weights_back(widened: list[int]) -> None:
    fused = bank_of(targets=MLP)
    before = {name: p.detach().clone() for name, p in weights(fused).items()}
    fuse(fused)
    settle(fused)
    assert moved(fused)
    uncompile_blocks(repeated_blocks(fused.model))
    assert not moved(fused)
    assert all(p.is_contiguous() and torch.equal(p, before[name]) for name, p in weights(fused).items())


@pytest.mark.slow
def test_more_adapters_than_borders_have_room_for(widened: list[int]) -> None:
    """Room grows once, and where it doesn't pay any more layers go on by themselves."""
    plain, fused = pair(targets=MLP)
    settle(fused)
    sizes = [moved_size(fused)]
    for name, rank in (("c", 16), ("d", 16), ("e", 16), ("f", 16)):  # 68 ranks
        for bank in (plain, fused):
            add(bank, name, rank=rank, targets=MLP)
    widened.clear()
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    sizes.append(moved_size(fused))
    assert len(widened) == 8
    for bank in (plain, fused):
        for i in range(5):
            add(bank, f"more{i}", rank=16, targets=MLP)
    widened.clear()
    with told_that_borders_end():
        found = settle(fused)
    assert_same(found, settle(plain))  # pyright: ignore[reportArgumentType]
    assert not widened
    assert moved(fused) == set()
    assert sizes[0] < sizes[1]


def told_that_borders_end() -> Any:
    warn_once.cache_clear()
    return pytest.warns(UserWarning, match="ranks together don't fit in the borders of a layer's weight")


def moved_size(bank: AdapterBank) -> int:
    """Bytes of a down projection's storage."""
    return max(p.untyped_storage().nbytes() for name, p in weights(bank).items() if "down_proj" in name)


@pytest.mark.slow
def test_a_rank_that_is_too_large_leaves_layers_apart(widened: list[int]) -> None:
    plain, fused = pair(targets=MLP)
    for bank in (plain, fused):
        add(bank, "large", rank=17, targets=MLP)
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert not widened


def test_weights_that_somebody_else_replaces_are_followed(widened: list[int]) -> None:
    plain, fused = pair(targets=MLP)
    settle(fused)
    with torch.no_grad():
        for bank in (plain, fused):
            for name, p in weights(bank).items():
                if "up_proj" in name:
                    p.data = p.data * 1.5
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert moved(fused) == set(MLP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets", "expected", "passes"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], {"q_proj", "k_proj", "v_proj", "o_proj"}, [3, 1]),
        ("llama", ["q_proj", "v_proj"], {"q_proj", "v_proj"}, [2]),
        ("llama", ["up_proj", "down_proj"], {"up_proj", "down_proj"}, [1, 1]),
        ("opt", "all-linear", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, [3, 1, 1, 1]),  # with biases
        ("gpt2", "all-linear", set(), []),  # weights the other way round
    ],
)
def test_joined_layers(family: str, targets: list[str] | str, expected: set[str], passes: list[int], widened: list[int]) -> None:
    plain, fused = pair(family, targets=targets)
    before = {name: p.detach().clone() for name, p in weights(fused).items()}
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert widened == passes * 4  # two blocks, two passes
    assert moved(fused) == expected
    assert all(torch.equal(p, before[name]) for name, p in weights(fused).items())


@pytest.mark.slow
def test_joined_layers_of_adapters_that_differ(widened: list[int]) -> None:
    """Columns of a rank that only one of the layers has; then more ranks than there is room for."""
    plain, fused = pair(targets=["q_proj", "k_proj", "v_proj"])
    for bank in (plain, fused):
        add(bank, "keys", rank=14, targets=["k_proj"])
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert widened == [3] * 4
    widened.clear()
    for bank in (plain, fused):
        for i in range(3):
            add(bank, f"queries{i}", rank=16, targets=["q_proj", "v_proj"])
    with told_that_borders_end():
        found = settle(fused)
    assert_same(found, settle(plain))  # pyright: ignore[reportArgumentType]
    assert not widened
    assert not moved(fused)


def adapted(bank: AdapterBank) -> list[LoRALayer]:
    return [m for block in repeated_blocks(bank.model) for m in block.modules() if isinstance(m, LoRALayer)]


def test_which_layers_are_a_gated_mlp() -> None:
    bank = bank_of(targets="all-linear")
    found = gated_mlps(adapted(bank), bank.model)
    assert [[layer.path.split(".")[-1] for layer in group] for group in found] == [MLP, MLP]


def test_which_layers_are_joined() -> None:
    bank = bank_of(targets="all-linear")
    backward(bank, batch_of(LENGTHS, ROUTES))
    attention = [layer for layer in adapted(bank) if "self_attn" in layer.path]
    found = joined_layers(attention, bank.model)
    assert [[layer.path.split(".")[-1] for layer in group] for group in found] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]] * 2
    attention[0].base.weight = nn.Parameter(torch.zeros(2 * 4, 32), requires_grad=False)  # the other two still have 32 rows
    found = joined_layers(attention[:1], bank.model)
    assert not found  # 32 features of x for 8 of y: a copy of x costs more than it saves


def test_three_layers_of_an_attention_are_none() -> None:
    """Heads that are wider together than the hidden state: q and v widen it, o narrows it."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, head_dim=16)).eval()  # pyright: ignore[reportArgumentType]
    bank = make_bank(model=model, targets=["q_proj", "v_proj", "o_proj"])
    assert not gated_mlps(adapted(bank), bank.model)


def test_weights_that_two_blocks_share_stay_where_they_are(widened: list[int]) -> None:
    model = make_model("llama", spread=1.5)
    first, second = repeated_blocks(model)
    for name in MLP:
        second.get_submodule(f"mlp.{name}").weight = first.get_submodule(f"mlp.{name}").weight
    bank = make_bank(model=model, targets=MLP)
    assert not gated_mlps(adapted(bank), bank.model)


def test_a_captured_pass_is_known_by_where_the_weights_lie(widened: list[int]) -> None:
    """Else a graph would go on reading what was freed."""
    fused = bank_of(targets=MLP)

    def addresses() -> list[tuple[int, ...]]:
        return [block.addresses for block in fused_blocks(fused)]

    blocks = fuse(fused)
    settle(fused)
    before, kept = addresses(), [p.data for p in weights(fused).values()]
    assert addresses() == before
    uncompile_blocks(blocks)
    fuse(fused)
    settle(fused)
    assert all(now != then for now, then in zip(addresses(), before, strict=True))
    before = addresses()
    for name, p in weights(fused).items():
        if "up_proj" in name:
            p.data = p.data.clone()
    assert all(now != then for now, then in zip(addresses(), before, strict=True))
    assert kept


def test_room_follows_the_ranks_in_use(widened: list[int]) -> None:
    """Buffers that grew for adapters that are gone again don't count."""
    plain, fused = pair(targets=MLP)
    for bank in (plain, fused):
        for i in range(8):
            add(bank, f"more{i}", rank=16, targets=MLP)
        for i in range(8):
            bank.remove(f"more{i}")
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    assert widened


@pytest.mark.slow
def test_a_routers_mask_is_filled_beside_an_mlp_as_ops(widened: list[int]) -> None:
    """DeepSeek's router fills a mask in place, in the graph of its shared experts, a gated MLP."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = DeepseekV3Config(
            vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, n_group=4, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
        )  # fmt: skip
        model = DeepseekV3ForCausalLM(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(8.0 if p.ndim > 1 else 1.0)  # or all experts are much the same
        bank = make_bank(model=model, targets=MLP, exclude=["*.experts"])
        if fused:
            fuse(bank)
        with torch.no_grad(), bank.route("a"):
            for _ in range(2):
                logits = model(torch.arange(80).view(2, 40) % 58 + 3, use_cache=False).logits
        found.append(logits)
    assert widened
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_first_pass_in_inference_mode_leaves_a_model_that_trains(widened: list[int]) -> None:
    """What is made in it outlives it."""
    plain, fused = pair(targets="all-linear")
    for bank in (plain, fused):
        with torch.inference_mode(), bank.route("a"):
            for _ in range(2):
                bank.model(torch.ones(4, 20, dtype=torch.int64), use_cache=False)
    assert widened
    assert not any(p.is_inference() for p in weights(fused).values())
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("targets", [MLP, ["q_proj", "k_proj", "v_proj"]])
def test_weights_come_home_though_one_was_replaced(targets: list[str], widened: list[int]) -> None:
    fused = bank_of(targets=targets)
    fuse(fused)
    settle(fused)
    for name, p in weights(fused).items():
        if targets[0] in name:
            p.data = p.data.clone()
    uncompile_blocks(repeated_blocks(fused.model))
    assert not moved(fused)


@pytest.mark.variants(1)
@pytest.mark.parametrize("targets", [MLP, ["q_proj", "k_proj", "v_proj"]])
def test_places_of_adapters_that_are_gone_are_zero(targets: list[str], widened: list[int]) -> None:
    """Or what they last were would still be multiplied with zeros, which NaN survives."""
    plain, fused = pair(targets=targets)
    for bank in (plain, fused):
        add(bank, "gone", rank=8, targets=targets)
    settle(fused)
    before = {name: border(p).count_nonzero(1).max() for name, p in weights(fused).items() if name.split(".")[-2] in targets}
    for bank in (plain, fused):
        bank.remove("gone")
    assert_same(settle(fused), settle(plain))  # pyright: ignore[reportArgumentType]
    for name, p in weights(fused).items():
        if name in before:
            assert border(p).count_nonzero(1).max() == before[name] - 8
    assert widened


def border(weight: Tensor) -> Tensor:
    """All but the weight itself of what it is a view of, (features, places)."""
    numbers = weight.untyped_storage().nbytes() // weight.element_size()
    rows, columns = weight.shape
    if weight.is_contiguous():
        return weight.data.as_strided((numbers // columns, columns), (columns, 1), 0)[rows:].t()
    wide = weight.data.as_strided((rows, numbers // rows), (numbers // rows, 1), 0)
    return wide[:, columns:] if weight.storage_offset() == 0 else wide[:, : weight.storage_offset()]


def test_a_detached_model_has_its_weights_back(widened: list[int]) -> None:
    fused = bank_of(targets=MLP)
    model = fused.model
    fuse(fused)
    settle(fused)
    assert moved(fused)
    fused.detach()
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_a_model_that_is_moved_leaves_nothing_behind(widened: list[int]) -> None:
    """Nobody but the parameters holds the wide tensors."""
    fused = bank_of(targets=MLP)
    fuse(fused)
    settle(fused)
    down = next(p for name, p in weights(fused).items() if "down_proj" in name)
    gone = down.untyped_storage()._weak_ref()
    for p in weights(fused).values():
        p.data = p.data.clone()
    gc.collect()
    assert torch.UntypedStorage._expired(gone)
    torch.UntypedStorage._free_weak_ref(gone)
