"""The laws on a GPU: reference path, tiny models. Tolerances are stated where they are used."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lorabank as lb
from lorabank.bank.bank import AdapterBank
from lorabank.engine.batch import Batch, make_batch
from lorabank.engine.generate import sample
from lorabank.engine.sampling import SamplingConfig
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Relative distance of gradients: fp32 reorders sums, bf16 rounds activations to 8 bits."""


def model(dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to("cuda").eval()


def filled_bank(dtype: torch.dtype, names: tuple[str, ...] = ("a", "b")) -> AdapterBank:
    bank = lb.attach(model(dtype))
    for i, name in enumerate(names):
        bank.add(name, lb.AdapterConfig(rank=4 * (i + 1), alpha=16, dropout=0.1 * i), seed=i)
        with torch.no_grad():
            for p in bank.parameters(name):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + i)) * 0.05)
    return bank


def batch(routes: list[object]) -> Batch:
    g = torch.Generator().manual_seed(len(routes))
    rows = []
    for i in range(len(routes)):
        length = 5 + 3 * i
        rows.append((torch.randint(0, 97, (length,), generator=g).tolist(), [0.0] + [1.0] * (length - 1)))
    return make_batch(rows, routes)  # type: ignore[arg-type]


def gradients(bank: AdapterBank, name: str) -> list[torch.Tensor]:
    found = []
    for p in bank.parameters(name):
        assert p.grad is not None
        found.append(p.grad.clone())
        p.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law1_base_rows_equal_the_base(dtype: torch.dtype) -> None:
    base = model(dtype)
    ids = torch.randint(0, 97, (3, 9), device="cuda")
    with torch.no_grad():
        expected = base(ids).logits
    bank = filled_bank(dtype)
    with torch.no_grad(), bank.route(["a", lb.BASE, "b"]):
        mixed = bank.model(ids).logits
    assert torch.equal(mixed[1], expected[1])
    assert not torch.equal(mixed[0], expected[0])
    with torch.no_grad():
        assert torch.equal(bank.detach()(ids).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law2_a_mixed_batch_equals_separate_ones(dtype: torch.dtype, checkpointing: bool) -> None:
    bank = filled_bank(dtype)
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    whole = batch(["a", "b", "a", lb.BASE, "b"])
    steps = {"a": 3, "b": 3}
    joint = forward_backward(engine, whole, steps=steps)
    together = {name: gradients(bank, name) for name in ("a", "b")}
    for name, rows in (("a", [0, 2]), ("b", [1, 4])):
        alone = forward_backward(engine, whole.select(rows), steps=steps)[name]
        assert alone.mean == pytest.approx(joint[name].mean, rel=TOLERANCE[dtype])
        for mine, other in zip(gradients(bank, name), together[name], strict=True):
            assert float((mine - other).norm() / other.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law3_joint_training_equals_training_alone(dtype: torch.dtype) -> None:
    def losses(names: tuple[str, ...]) -> dict[str, list[float]]:
        bank = filled_bank(dtype)
        engine, optimizer = Engine(bank), SlotOptimizer(bank)
        for name in names:
            optimizer.add(name)
        found: dict[str, list[float]] = {name: [] for name in names}
        rows = batch(["a", "a", "b", "b"])
        rows = rows.select([i for i, route in enumerate(rows.routes) if route in names])
        for step in range(20):
            result = forward_backward(engine, rows, steps=dict.fromkeys(names, step))
            optim_step(optimizer, dict.fromkeys(names, 3e-3), {name: loss.tokens for name, loss in result.items()})
            for name in names:
                found[name].append(result[name].mean)
        return found

    joint = losses(("a", "b"))
    for name in ("a", "b"):
        alone = losses((name,))[name]
        assert alone == pytest.approx(joint[name], rel=1e-3 if dtype == torch.float32 else 5e-2)
        assert sum(alone[-5:]) < sum(alone[:5])


def test_law4_a_nan_slot_touches_nothing_else() -> None:
    bank = filled_bank(torch.float32)
    clean = forward_backward(Engine(bank), batch(["a", "b", "a"]), steps={"a": 0, "b": 0})["a"]
    expected = gradients(bank, "a")
    gradients(bank, "b")
    with torch.no_grad():
        bank.parameters("b")[1].fill_(float("nan"))
    dirty = forward_backward(Engine(bank), batch(["a", "b", "a"]), steps={"a": 0, "b": 0})
    assert not dirty["b"].finite
    assert dirty["a"].loss_sum == clean.loss_sum
    assert all(torch.equal(x, y) for x, y in zip(gradients(bank, "a"), expected, strict=True))


def test_dropout_draws_the_same_on_every_device() -> None:
    from lorabank.kernels.segments import DropoutDraw, dropout_mask

    on = [
        dropout_mask(DropoutDraw(probability=0.3, seed=5, step=7, examples_U=torch.arange(4, device=device)), 6, 33).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*on)


def test_sampling_on_a_gpu_follows_the_route() -> None:
    bank = filled_bank(torch.float32)
    prompts, config = [[1, 2, 3], [4, 5], [1, 2, 3]], SamplingConfig(max_new_tokens=8)
    mixed = sample(bank, prompts, ["a", "b", lb.BASE], config=config)
    for i, route in enumerate(["a", "b", lb.BASE]):
        assert sample(bank, [prompts[i]], [route], config=config)[0].tokens == mixed[i].tokens


def test_adapters_follow_the_model_between_devices() -> None:
    bank = filled_bank(torch.float32)
    ids = torch.randint(0, 97, (1, 7))
    with bank.route("a"), torch.no_grad():
        on_gpu = bank.model(ids.to("cuda")).logits.cpu()
        on_cpu = bank.model.to("cpu")(ids).logits
    assert all(p.device.type == "cpu" for p in bank.parameters())
    torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-3, atol=1e-4)
