"""Regional compilation: each of a model's repeated blocks through torch.compile, so that element-wise work is fused.

Blocks of one class share their compiled code, which keeps the start short. On a GPU with Triton the LoRA products are part of
it (see `FusedBlock`); elsewhere they stay the eager ones (kernels/ops.py). Either way another route compiles nothing again, nor
does another adapter of ranks that are known: there is one form for largest ranks up to 16, 64, 128 and so on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from lorabank.config.checks import check_choice
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.fused_norm import FusedNorm, norms_beside
from lorabank.engine.parts import is_out_of_memory, stop_if_interrupted
from lorabank.errors import ConfigError
from lorabank.kernels.gpu import runtime
from lorabank.notices import warn_once

_TRY = "so compile: true tries it"


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand in a list with others of their class: a transformer's layers.

    Of stages (Swin's, ResNet's), which differ in size, it is the blocks inside: their code is shared, a stage's would be its own.
    """
    return _repeated(model, stages=True)


def _repeated(model: nn.Module, *, stages: bool) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in model.children():
        blocks = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(blocks) < 2 or len({type(block) for block in blocks}) > 1:
            found += _repeated(module, stages=stages)
            continue
        inside = [_repeated(nn.ModuleList([block]), stages=False) for block in blocks] if stages and _differ(blocks) else []
        found += [block for own in inside for block in own] if inside and all(inside) else blocks
    return found


def _differ(blocks: Sequence[nn.Module]) -> bool:
    return len({tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}) > 1


def uncompiled_because(model: nn.Module) -> str | None:
    """Why blocks aren't compiled where nobody says, as a clause for people; "" where nobody would expect it; None: they are.

    They are on an NVIDIA GPU from Ampere on, for a model that has repeated ones. Older ones lack registers for the kernels, which
    nobody has measured there.
    """
    device, _ = _place(model)
    if device.type != "cuda" or runtime.switched_off():
        return ""
    if torch.version.hip is not None:
        return f"nobody has measured that on AMD GPUs, {_TRY}"
    if not repeated_blocks(model):
        return f"{type(model).__name__} has no row of blocks of one class"
    why = runtime.bf16_missing(device, what="compiling unasked")
    return None if why is None else f"{why}, {_TRY}"


def compiles(model: nn.Module) -> bool:
    """Whether `compile_blocks` would compile the model's blocks for the GPU that it is on."""
    device, dtype = _place(model)
    if uncompiled_because(model) is not None:
        return False
    return (runtime.missing(device) or runtime.refused(device, dtype)) is None


def compile_blocks(
    model: nn.Module,
    *,
    blocks: Sequence[nn.Module] | None = None,
    recompute: bool = False,
    kept: str = "products",
    borders: bool = True,
) -> list[nn.Module]:
    """Compile the repeated blocks in place; returns what wasn't compiled before. Results don't change beyond rounding.

    On a GPU the norms beside the blocks go with them (fused_norm.py).

    `blocks`: modules of the model to compile instead, each of which takes hidden states first; for a model that has one block.
    `recompute`: the blocks will be recomputed in backward (activation checkpointing), which needs a GPU with Triton here.
    `kept`: on a GPU with Triton, what blocks keep for backward where they aren't recomputed: `products` (what products and
    attention need; the rest is computed again in passing) or `all` that saves time. `borders`: put LoRA into
    the borders of frozen weights there, where adapters have few ranks; the weights become views of tensors with room for A
    and B beside them until `uncompile_blocks`.
    A GPU that Triton can't compile for, or not for this dtype, leaves the blocks as they are: a warning says so, once. Raises
    ConfigError when there is nothing to compile, and on a CPU for recomputation or without a C++ compiler.
    """
    check_choice("kept", kept, ("products", "all"))
    blocks = repeated_blocks(model) if blocks is None else list(blocks)
    if not blocks:
        raise ConfigError(f"compile: {type(model).__name__} has no repeated blocks to compile. Leave compile out.")
    device, dtype = _place(model)
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError(
            "compile: on a CPU it needs a C++ compiler (g++ or clang++) and none was found. Install one, or leave compile out."
        )
    on_gpu = device.type == "cuda" and not runtime.switched_off()
    why = (runtime.missing(device) or runtime.refused(device, dtype)) if on_gpu else None
    if device.type == "cuda" and not on_gpu:
        why = runtime.unusable(device)  # torch's own compiler needs Triton as well
    if why is not None:
        warn_once(
            f"compile: the blocks of {type(model).__name__} stay uncompiled, and steps slower: {why}. "
            "compile: false silences this."
        )
        return []
    if recompute and not on_gpu:
        raise ConfigError(
            "compile: can't be combined with gradient_checkpointing without a GPU that Triton compiles for. "
            "Leave one of them out."
        )
    fresh = [block for block in blocks if block._compiled_call_impl is None]
    for block in fresh:
        if on_gpu:
            block._compiled_call_impl = FusedBlock(block, kept=kept, borders=borders)
        else:
            block.compile()
    if on_gpu and fresh:
        norms = [norm for norm in norms_beside(model, blocks) if norm._compiled_call_impl is None]
        for norm in norms:
            norm._compiled_call_impl = FusedNorm(norm)
        fresh += norms
    return fresh


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model computes, and in which dtype: that of the weights that aren't quantised."""
    on_gpu = [p for p in model.parameters() if p.device.type != "cpu"] or list(model.parameters())
    plain = [p for p in on_gpu if p.is_floating_point() and p.element_size() > 1]
    device = on_gpu[0].device if on_gpu else torch.device("cpu")
    return device, plain[0].dtype if plain else torch.float32


def uncompile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Run what `compile_blocks` returned as plain modules again."""
    for block in blocks:
        if isinstance(block._compiled_call_impl, FusedBlock):
            block._compiled_call_impl.release()
        block._compiled_call_impl = None


def give_up(model: nn.Module, error: Exception) -> bool:
    """Uncompile `model`'s blocks because a kernel of theirs doesn't run or torch can't compile their backward, and say so once.

    Where no block is compiled, a kernel beside them (of the loss, of norms) is left out, and all others. False where `error` is
    neither, or nothing is left to be given up.
    """
    blocks = [m for m in model.modules() if isinstance(m._compiled_call_impl, FusedBlock | FusedNorm)]
    kernels, compilers = runtime.is_tritons(error), isinstance(error, TorchDynamoException)
    if not (kernels or compilers) or is_out_of_memory(error):  # a smaller pass compiles
        return False
    stop_if_interrupted(error)
    reason = " ".join(str(error).split())[:300]
    if not blocks:
        refused = kernels and runtime.refuse(_place(model)[0], f"a kernel doesn't run there ({type(error).__name__}: {reason})")
        if refused:
            warn_once(
                f"training runs on plain torch from here on, the same results, slower: a kernel doesn't run on this GPU "
                f"({type(error).__name__}: {reason}). {runtime.SWITCH}=0 silences this."
            )
        return refused
    uncompile_blocks(blocks)
    why = "a kernel doesn't run on this GPU" if kernels else "torch can't compile their backward pass"
    warn_once(
        f"compile: {why}, so the blocks of {type(model).__name__} run uncompiled from here on: the same results, slower "
        f"({type(error).__name__}: {reason}). compile: false silences this."
    )
    return True
