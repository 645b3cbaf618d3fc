"""LoftQ over a base that bitsandbytes holds in NF4: PEFT's own start beside it, first outputs, and training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lorabank as lb
from lorabank.bank.bank import AdapterBank
from lorabank.bank.kinds import layer_kind
from lorabank.engine.batch import make_batch
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

RANK, STEPS = 16, 12


def models(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the model in `dtype`, the same with its linear layers in NF4)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    original = AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).eval()
    base = copy.deepcopy(original)
    lb.quantize_base(base, "nf4")
    return original, base


def config(init: str = "loftq") -> lb.AdapterConfig:
    return lb.AdapterConfig(rank=RANK, alpha=RANK, init=init)


def stored(base: nn.Module, path: str) -> Tensor:
    """The weight (out, in) that a layer in NF4 stands for, fp32."""
    layer = base.get_submodule(path)
    kind = layer_kind(layer)
    assert kind is not None and kind.storage == "nf4"
    return kind.weight_oi(layer._parameters, torch.float32)


def weight_of(model: nn.Module, path: str) -> Tensor:
    return model.get_submodule(path).get_parameter("weight").detach().float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_it_starts_where_peft_does_over_the_same_stored_weights(tmp_path: Path) -> None:
    """`replace_lora_weights_loftq`: both take W − Q of one Q. PEFT's SVD is in fp32, ours goes through fp64. The vectors' signs
    are free, so products are compared; what fp32 leaves of them is about 1e-6 over the gap between two singular values.
    """
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    original, base = models()
    original.save_pretrained(tmp_path)
    mine = lb.loftq(base, original, config())
    base.__dict__["is_loaded_in_4bit"] = True  # what transformers says of a model that it loads so, and PEFT asks for
    settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    theirs = peft.get_peft_model(base, settings)
    peft.replace_lora_weights_loftq(theirs, model_path=str(tmp_path))
    parts = {name.removeprefix("base_model.model."): p.detach() for name, p in theirs.named_parameters() if ".lora_" in name}
    assert len(mine.A) == len(parts) / 2 == 21
    for path, A in mine.A.items():
        their_A, their_B = (parts[f"{path}.lora_{part}.default.weight"].cpu().float() for part in "AB")
        assert relative(mine.B[path] @ A, their_B @ their_A) < 1e-3, path
        torch.testing.assert_close(A.norm(dim=1), their_A.norm(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.B[path].norm(dim=0), their_B.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_it_comes_as_near_the_weights_as_with_peft_s_own_quantiser() -> None:
    """`loftq_init`, what a `LoftQConfig(loftq_iter=1)` calls: PEFT keeps the blocks' factors in fp32, lorabank in 8 bits (double
    quantisation, 0.4 bits a weight less). That moves Q by about 0.25 %, so W − Q, a tenth of W, by a fortieth: enough to turn
    single directions where singular values lie close. What is compared is how large they are (0.5 % apart on a CPU, bitsandbytes
    0.50), and how near Q + B A comes to W (0.1 % apart there).
    """
    utils = pytest.importorskip("peft.utils.loftq_utils", reason="peft isn't installed")
    original, base = models()
    mine = lb.loftq(base, original, config())
    for path, A in mine.A.items():
        weight = weight_of(original, path)
        started = [part.cpu().float() for part in utils.loftq_init(weight, num_bits=4, reduced_rank=RANK, num_iter=1)]
        (their_Q, their_A, their_B), W, Q = started, weight.cpu(), stored(base, path).cpu()
        assert relative(Q, their_Q) < 0.01, path
        torch.testing.assert_close(A.norm(dim=1) ** 2, their_A.norm(dim=1) ** 2, rtol=0.02, atol=0)
        left, their_left, without = relative(Q + mine.B[path] @ A, W), relative(their_Q + their_B @ their_A, W), relative(Q, W)
        assert left == pytest.approx(their_left, rel=0.01), path
        assert left < 0.9 * without, path


def test_first_outputs_are_nearer_to_the_unquantised_models() -> None:
    original, base = models()
    bank = lb.attach(base)
    bank.add("plain", config("uniform"))
    bank.add("loftq", lb.loftq(bank, original, config()))
    ids = torch.randint(0, 97, (16, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = original(ids).logits
        found = {}
        for route in ("plain", "loftq"):
            with bank.route(route):
                found[route] = bank.model(ids).logits
        with bank.route(lb.BASE):
            assert torch.equal(found["plain"], bank.model(ids).logits)
    assert relative(found["loftq"], expected) < 0.95 * relative(found["plain"], expected)


def stored_bytes(base: nn.Module) -> dict[str, bytes]:
    """All parameters of the base, packed ones as they lie there; those of wrapped layers too."""
    return {
        name: p.detach().as_subclass(Tensor).contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
        for name, p in base.named_parameters()
        if not p.requires_grad
    }


def losses(bank: AdapterBank, compiled: bool) -> dict[str, list[float]]:
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name)
    blocks = compile_blocks(bank.model) if compiled else []
    g = torch.Generator().manual_seed(5)
    rows = [(torch.randint(0, 97, (40,), generator=g).tolist(), [0.0] + [1.0] * 39) for _ in range(2)]
    batch = make_batch(rows * len(bank.names), [name for name in bank.names for _ in rows])
    found: dict[str, list[float]] = {name: [] for name in bank.names}
    for step in range(STEPS):
        result = forward_backward(engine, batch, steps=dict.fromkeys(bank.names, step))
        for name in bank.names:
            assert all(bool(p.grad.isfinite().all()) for p in bank.parameters(name) if p.grad is not None)
            found[name].append(result[name].mean)
        optim_step(optimizer, dict.fromkeys(bank.names, 3e-3), {name: loss.tokens for name, loss in result.items()})
    uncompile_blocks(blocks)
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_and_the_base_stays(compiled: bool) -> None:
    original, base = models(torch.bfloat16)
    before = stored_bytes(base)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        plain = base(ids).logits
    bank = lb.attach(base)
    bank.add("plain", config("uniform"))
    bank.add("loftq", lb.loftq(bank, original, config()))
    found = losses(bank, compiled)
    for name, curve in found.items():
        assert torch.tensor(curve).isfinite().all(), name
        assert curve[-1] < 0.9 * curve[0], name
    assert found["loftq"][0] != found["plain"][0], "it changes outputs from the first step on"
    detached = bank.detach()
    assert stored_bytes(detached) == before
    with torch.no_grad():
        assert torch.equal(detached(ids).logits, plain)
