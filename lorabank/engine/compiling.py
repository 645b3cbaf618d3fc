"""Regional compilation: each of a model's repeated blocks through torch.compile, so that element-wise work is fused.

Blocks of one class share their compiled code, which keeps the start short. On a GPU with Triton the LoRA products are part of
it (see `FusedBlock`); elsewhere they stay the eager ones (kernels/ops.py). Either way adding adapters or changing the route
compiles nothing again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from torch import nn

from lorabank.engine.fused_block import FusedBlock
from lorabank.errors import ConfigError
from lorabank.kernels.gpu import runtime


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand in a list with others of their class: a transformer's layers."""
    found: list[nn.Module] = []
    for module in model.children():
        blocks = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            found += blocks
        else:
            found += repeated_blocks(module)
    return found


def compile_blocks(model: nn.Module, *, recompute: bool = False) -> list[nn.Module]:
    """Compile the repeated blocks in place; returns those that weren't compiled before. Results don't change beyond rounding.

    `recompute`: the blocks will be recomputed in backward (activation checkpointing), which needs a GPU with Triton here. Raises
    ConfigError where it lacks one, when there is nothing to compile, or no C++ compiler on a CPU.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(f"compile: {type(model).__name__} has no repeated blocks to compile. Leave compile out.")
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if on_cpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError(
            "compile: on a CPU it needs a C++ compiler (g++ or clang++) and none was found. Install one, or leave compile out."
        )
    fresh = [block for block in blocks if block._compiled_call_impl is None]
    for block in fresh:
        device = next((p.device for p in block.parameters()), None)
        if device is not None and device.type == "cuda" and runtime.available(device):
            block._compiled_call_impl = FusedBlock(block)
        elif recompute:
            uncompile_blocks(fresh)
            raise ConfigError(
                "compile: can't be combined with gradient_checkpointing without a GPU that Triton compiles for. "
                "Leave one of them out."
            )
        else:
            block.compile()
    return fresh


def uncompile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Run what `compile_blocks` returned as plain modules again."""
    for block in blocks:
        block._compiled_call_impl = None
