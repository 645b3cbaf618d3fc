"""A model's outputs with an adapter beside it and merged into it, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.attach import attach
from lorabank.bank.kinds import layer_kind
from lorabank.bank.layers import LoRALayer
from lorabank.bank.multihead import Projection
from lorabank.bank.reach import is_attached
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import output_norms
from lorabank.merging.report import MergeReport

Inputs = Tensor | Mapping[str, Any]
"""A batch of a model: a dict (called as `model(**inputs)`) or one tensor."""


@dataclass(frozen=True, kw_only=True)
class LogitsCheck:
    """Merged against unmerged outputs of a whole model."""

    difference: float
    """Largest absolute difference of an output."""
    change: float
    """Largest absolute change that the adapter makes to an output, for scale."""
    agreement: float
    """Share of positions whose largest output (the greedy token) is the same."""
    report: MergeReport
    """What merging lost in the weights."""

    def __str__(self) -> str:
        return (
            f"merged and unmerged outputs differ by at most {self.difference:.3g} "
            f"(the adapter's change is up to {self.change:.3g}); the same greedy choice at {self.agreement:.1%} of the positions"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients: the base's own dropout would drown a comparison."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def outputs_beside(model: nn.Module, adapter: Adapter, inputs: Inputs, *, strength: float) -> tuple[Tensor, Tensor]:
    """(outputs of the plain model, outputs with `adapter` beside it), fp32."""
    with _evaluating(model):
        plain = _outputs(model, inputs)
        with adapter_beside(model, adapter, strength=strength):
            return plain, _outputs(model, inputs)


def merged_outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """Outputs of the model as it is now, fp32."""
    with _evaluating(model):
        return _outputs(model, inputs)


def compare(plain: Tensor, beside: Tensor, merged: Tensor, report: MergeReport) -> LogitsCheck:
    """Merged outputs against unmerged ones. Raises MergeError when the merged ones alone aren't finite, and without rows."""
    if not beside.numel():
        raise MergeError("merge: inputs hold no row, so there are no outputs to compare. Give a batch with at least one row.")
    if beside.isfinite().all() and not merged.isfinite().all():
        raise MergeError("merge: the merged model's outputs are not finite, those of base and adapter apart are")
    return LogitsCheck(
        difference=float((merged - beside).abs().max()),
        change=float((beside - plain).abs().max()),
        agreement=float((merged.argmax(-1) == beside.argmax(-1)).float().mean()),
        report=report,
    )


@contextmanager
def adapter_beside(model: nn.Module, adapter: Adapter, *, strength: float = 1.0) -> Iterator[None]:
    """While open, every layer of `adapter` adds its change to the layer's output, through forward hooks: the plain definition.

    Experts of a stack and nn.MultiheadAttention's projections have no output of their own, norms' biases no layer, and modules
    trained in full aren't added to: then a bank does it. Raises MergeError where the model has one already.
    """
    inside = {path for path, layer in adaptable_layers(model).items() if isinstance(layer, Projection)}
    changed = any(layer.stack or layer.lora_bias is not None or path in inside for path, layer in adapter.layers.items())
    if adapter.modules or adapter.extras or changed:
        if is_attached(model):
            raise MergeError(
                "merge: with inputs the outputs of a mixture, of nn.MultiheadAttention, or with trained biases, rows or modules, "
                "are compared through a bank, and this model has one. Leave inputs out, or detach the bank first (bank.detach())."
            )
        bank = attach(model)
        try:
            bank.load("beside", adapter, force=True)
            with bank.route({"beside": strength}):
                yield
        finally:
            bank.detach()
        return
    hooks = []
    try:
        for path, layer in adapter.layers.items():
            module = model.get_submodule(path)
            hooks.append(module.register_forward_hook(_adding(layer, map_of(module), strength)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def map_of(module: nn.Module) -> LowRankMap:
    """How a layer's change is made of two narrow products; of a wrapped layer, its base's."""
    base = module.base if isinstance(module, LoRALayer) else module
    kind = layer_kind(base)
    if kind is None:
        raise MergeError(f"merge: a {type(base).__name__} can't be merged into")
    return kind.low_rank_map(base)


def _adding(layer: AdapterLayer, layer_map: LowRankMap, strength: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        wide = torch.promote_types(output.dtype, layer.A.dtype)
        A, B = layer.A.flatten(1).to(x.device, wide), layer.B.t().to(x.device, wide)
        shrunk = layer_map.shrink(x.to(wide) if x.is_floating_point() else x, A)
        change = strength * layer.scaling * layer_map.expand(shrunk, B)
        if layer.magnitude is None:
            return output + change.to(output.dtype)
        norms = output_norms(_weight_oi(module), A, B, layer.scaling)
        return decomposed(change, output.to(wide), layer.magnitude.to(norms) / norms, module, layer_map).to(output.dtype)

    return hook


def _weight_oi(module: nn.Module) -> Tensor:
    """The weight as (out, in); of a quantised one a copy in fp32."""
    base = module.base if isinstance(module, LoRALayer) else module
    kind = layer_kind(base)
    assert kind is not None  # the layer's map was made of it
    return kind.weight_oi(base._parameters, torch.float32 if kind.quantized else None)


def decomposed(change: Tensor, y: Tensor, gain_O: Tensor, layer: nn.Module, layer_map: LowRankMap) -> Tensor:
    """gain · (y − bias + change) + bias, what a decomposed layer gives."""
    bias = layer._parameters.get("bias")
    bias = torch.zeros((), dtype=y.dtype, device=y.device) if bias is None else layer_map.outputs(bias.detach().to(y.dtype), y)
    return layer_map.outputs(gain_O, y) * (y - bias + change) + bias


def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    out = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    if isinstance(out, Tensor):
        return out.float()
    if isinstance(out, Mapping) and "logits" in out:
        return out["logits"].float()
    first = out[0] if isinstance(out, tuple) else next(iter(out.values()))
    return first.float()
