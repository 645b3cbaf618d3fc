"""What of an image model is compiled on a GPU: its transformer blocks with LoRA inside, its convolution blocks without.

A U-Net is no row of blocks of one class, so `repeated_blocks` doesn't find what is worth compiling. Blocks of a class share their
code; convolution blocks have a form for each of a model's shapes (about a dozen in Stable Diffusion), which don't vary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from lorabank.bank.layers import LoRALayer
from lorabank.engine.compiling import compile_blocks, compiles
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.parts import capturing, is_out_of_memory, stop_if_interrupted
from lorabank.notices import warn_once
from lorabank.tasks.diffusion.model import ImageModel

FORMS = 64
"""Of one class of convolution blocks: shapes, with gradients and without."""
_BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """diffusers' transformer blocks, whose first input are hidden states (N, T, C)."""
    return [module for module in model.modules() if type(module).__name__ in _BLOCKS]


def convolution_blocks(model: nn.Module) -> list[nn.Module]:
    """What of a U-Net is worth compiling beside them: norms, activations and sums around convolutions."""
    inside = {id(part) for block in transformer_blocks(model) for part in block.modules()}
    norms = [m for m in model.modules() if _is_norm(m)]
    found = [module for module in model.modules() if type(module).__name__ in _CONVOLUTIONS]
    held = {id(part) for block in found for part in block.modules()} | inside
    return found + [norm for norm in norms if id(norm) not in held]


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.GroupNorm and not module._forward_hooks and not module._forward_pre_hooks


def compile_image_model(model: ImageModel, *, convolutions: bool = True, channels_last: bool = True) -> list[nn.Module]:
    """Compile the denoiser's blocks in place, if it is on a GPU that they can be compiled for; returns what was compiled.

    `convolutions`: those of a U-Net too. `channels_last`: keep their weights and activations in the order that tensor cores take.
    """
    if not compiles_image_model(model):
        return []
    made = compile_blocks(model, blocks=transformer_blocks(model.denoiser))
    if not made or not convolutions or model.family.denoiser != "unet":
        return made
    if channels_last:
        model.denoiser.to(memory_format=torch.channels_last)
    for block in convolution_blocks(model.denoiser):
        if block._compiled_call_impl is None:
            block._compiled_call_impl = ShapedBlock(block)
            made.append(block)
    return made


def compiles_image_model(model: ImageModel) -> bool:
    """Whether this GPU's blocks would be compiled unasked."""
    return compiles(model.denoiser) and bool(transformer_blocks(model.denoiser))


@contextlib.contextmanager
def as_it_is(denoiser: nn.Module) -> Iterator[None]:
    """The blocks uncompiled: pictures and validations come in other shapes than training, each of which would be compiled."""
    held = [(m, m._compiled_call_impl) for m in denoiser.modules() if isinstance(m._compiled_call_impl, FusedBlock | ShapedBlock)]
    try:
        for module, _ in held:
            module._compiled_call_impl = None
        yield
    finally:
        for module, compiled in held:
            module._compiled_call_impl = compiled


class ShapedBlock:
    """What `block(...)` calls instead of its own code once it is compiled, one form for each shape."""

    def __init__(self, block: nn.Module, *, backend: Any = "inductor") -> None:
        self.block = block
        self.failed = False
        # torch leaves its own modules' `_call_impl` uncompiled, and compiles their `forward`; a norm here has no hooks
        self._compiled = torch.compile(block.forward if _is_norm(block) else block._call_impl, dynamic=False, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's outputs; a block whose layers are adapted runs as it is."""
        if self.failed or self._is_adapted():
            return self.block._call_impl(*args, **kwargs)
        try:
            with dynamo_config.patch(recompile_limit=FORMS):
                return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            stop_if_interrupted(error)
            if is_out_of_memory(error) or capturing():
                raise
            self.failed = True
            reason = " ".join(str(error).split("\n")[:2])[:300]
            warn_once(
                f"compile: torch can't compile {type(self.block).__name__}, so it runs uncompiled: the same results, slower "
                f"({type(error).__name__}: {reason}). compile: false silences this."
            )
        return self.block._call_impl(*args, **kwargs)

    def _is_adapted(self) -> bool:
        return any(isinstance(module, LoRALayer) and module.in_use for module in self.block.modules())
