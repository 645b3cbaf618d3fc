"""What is compiled of an image model computes what it computed before; tests/gpu/test_diffusion.py has it on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiled import left_out
from lorabank.engine.compiling import uncompile_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.own_pass import TrainingPass
from lorabank.tasks.diffusion.batch import picture_losses
from lorabank.tasks.diffusion.draws import draw
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import objective_of, row_losses, row_tensors
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures
from lorabank.tasks.diffusion.speed import ShapedBlock, compile_image_model, convolution_blocks, transformer_blocks
from tests.tasks.diffusion.tiny import model_of, pipeline

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for a GPU there"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
    pytest.mark.filterwarnings("ignore:.* encountered in (matmul|exp|add):RuntimeWarning"),  # numpy, in the interpreter
]


@pytest.fixture(autouse=True)
def shared_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def banked(name: str, targets: list[str]) -> tuple[ImageModel, AdapterBank]:
    model = model_of(pipeline(name), name)
    bank = lb.attach(model)
    for seed, adapter in enumerate("ab"):
        bank.add(adapter, lb.AdapterConfig(rank=2 + seed, targets=targets), seed=seed)
        with torch.no_grad():
            for leaf in bank.parameters(adapter):
                leaf.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    return model, bank


def batch_of(model: ImageModel, seed: int) -> dict[str, torch.Tensor]:
    draws = [draw((4, 8, 8), seed + i) for i in range(3)]
    objective = objective_of(model.scheduler)
    with torch.no_grad():
        text = model.encode(model.tokenize(["a cat"]))["text"].expand(3, -1, -1).clone()
    return {
        "clean": torch.stack([draw((4, 8, 8), 90 + i).noise for i in range(3)]),
        "noise": torch.stack([each.noise for each in draws]),
        "condition.text": text,
        **row_tensors([objective.numbers(each) for each in draws]),
    }


@pytest.mark.long
@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0"], ["to_q", "ff.net.2", "conv1"]])
def test_compiled_blocks_give_the_same_gradients(targets: list[str]) -> None:
    """LoRA inside the transformer blocks; convolution blocks whose layers are adapted run as they are."""
    model, bank = banked("sd2", targets)
    other, plain = banked("sd2", targets)
    made = [*transformer_blocks(model), *convolution_blocks(model)]
    assert len(transformer_blocks(model)) == 4
    for block in made:
        wrapper = FusedBlock if block in transformer_blocks(model) else ShapedBlock
        block._compiled_call_impl = wrapper(block, backend="aot_eager")
    model.denoiser.to(memory_format=torch.channels_last)
    assert bool(left_out(bank)) == ("conv1" in targets)
    passes = [TrainingPass(b, lambda batch, m=m: row_losses(batch, m(batch))) for m, b in ((model, bank), (other, plain))]
    for seed in range(2):
        route = [["a", BASE, "b"], ["b", "a", "a"]][seed]
        found, expected = (run(batch_of(model, 10 * seed), route) for run in passes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name in "ab":
        for one, wanted in zip(bank.parameters(name), plain.parameters(name), strict=True):
            assert one.grad is not None and wanted.grad is not None
            assert (one.grad - wanted.grad).norm() <= 1e-3 * wanted.grad.norm() + 1e-6
    assert not any(block._compiled_call_impl.failed for block in made)
    uncompile_blocks(made)
    assert all(block._compiled_call_impl is None for block in made)


def test_pictures_and_validations_run_the_blocks_as_they_are() -> None:
    """Each of their shapes would be compiled otherwise, before the first step."""

    class Refusing:
        def __init__(self, block: torch.nn.Module) -> None:
            self.block = block

        def __call__(self, *args: object, **kwargs: object) -> object:
            raise AssertionError("the compiled form was called")

    class Fused(Refusing, FusedBlock):
        pass

    class Shaped(Refusing, ShapedBlock):
        pass

    model, bank = banked("sd2", ["to_q"])
    made = [*transformer_blocks(model), *convolution_blocks(model)]
    compiled = {id(block): (Fused if block in transformer_blocks(model) else Shaped)(block) for block in made}
    for block in made:
        block._compiled_call_impl = compiled[id(block)]
    batch = batch_of(model, 1)
    condition = {"text": batch["condition.text"]}
    config = PictureConfig(steps=2, guidance=2.0, height=16, width=16)
    assert draw_pictures(model, bank, condition, condition, ["a", BASE, "b"], seeds=[1, 2, 3], config=config).isfinite().all()
    with torch.no_grad(), bank.route(["a", BASE, "b"]):
        assert picture_losses(model, batch, {}).shape == (3,)
    assert all(block._compiled_call_impl is compiled[id(block)] for block in made)
    with pytest.raises(AssertionError, match="the compiled form was called"), bank.route("a"):
        picture_losses(model, batch, {})


def test_nothing_is_compiled_unasked_on_a_cpu() -> None:
    model, _ = banked("sd", ["to_q"])
    assert compile_image_model(model) == []


def test_a_block_that_cannot_be_compiled_runs_plainly_and_says_so() -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no code for this")

    model, _ = banked("sd", ["to_q"])
    block = convolution_blocks(model)[0]
    width = next(p for p in block.parameters() if p.ndim == 4).shape[1]
    x, temb = torch.randn(1, width, 8, 8), torch.randn(1, 128)
    expected = block(x, temb)
    block._compiled_call_impl = ShapedBlock(block, backend=broken)
    with pytest.warns(UserWarning, match="torch can't compile ResnetBlock2D, so it runs uncompiled"):
        assert torch.equal(block(x, temb), expected)
    assert block._compiled_call_impl.failed


def test_norms_that_stand_alone_are_compiled() -> None:
    """torch skips its own modules' code unless it is told otherwise."""
    model, _ = banked("sd", ["to_q"])
    alone = [block for block in convolution_blocks(model) if type(block) is nn.GroupNorm]
    assert alone
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph.code)
        return graph

    for norm in alone[:2]:
        x = torch.randn(2, norm.num_channels, 4, 4)
        norm._compiled_call_impl = ShapedBlock(norm, backend=backend)
        torch.testing.assert_close(norm(x), norm._call_impl(x))
    assert compiled and all("group_norm" in code for code in compiled)
