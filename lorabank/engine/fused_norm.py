"""The norms that stand beside a model's repeated blocks, such as the one before its head, compiled as the blocks are.

Written in Python, such a norm is a dozen passes over the hidden states forward and backward, and keeps fp32 copies of them: as
much as the norms of several compiled blocks. What has few tokens and no gradients runs as it is, as in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from lorabank.engine.fused_block import FEW, VARIANTS
from lorabank.engine.parts import capturing, is_out_of_memory, stop_if_interrupted
from lorabank.engine.varying import vary_lengths
from lorabank.notices import warn_once


class FusedNorm:
    """Stands in a module's `_compiled_call_impl`, as torch.compile's own wrapper would."""

    def __init__(self, module: nn.Module, *, backend: str = "inductor") -> None:
        self.module = module
        self._compiled = torch.compile(module._call_impl, backend=backend)
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's output."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        few = not torch.is_grad_enabled() and all(x.numel() < FEW * x.shape[-1] for x in given if x.ndim)
        if self.failed or few:
            return self.module._call_impl(*args, **kwargs)
        if given:
            vary_lengths(given[0], args, kwargs)
        try:
            with dynamo_config.patch(recompile_limit=VARIANTS):
                return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            stop_if_interrupted(error)
            if is_out_of_memory(error) or capturing():
                raise  # a smaller pass compiles, and so does one that isn't being captured
            self.failed = True
            name, reason = type(self.module).__name__, str(error).splitlines()[0][:200]
            warn_once(f"compile: torch can't compile {name}, so it runs uncompiled: {type(error).__name__}: {reason}")
        return self.module._call_impl(*args, **kwargs)


def norms_beside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules outside of the blocks whose weights are vectors and that are written in Python: torch's own are one kernel."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside and _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    held = [b for b in module._buffers.values() if b is not None]
    plain = not module._modules and bool(own) and all(p.ndim == 1 for p in own) and all(b.ndim < 2 for b in held)
    return plain and not type(module).__module__.startswith("torch.")
