"""How a model is told where the examples of packed rows begin and end: one of `WAYS`, found by a probe on the model itself.

Position ids start anew with each example in every way, but none relies on them: boundaries go to the attention explicitly.

Shapes: N rows × L tokens, S spans (examples, and the padding behind them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE
from lorabank.engine.attention import configurations, own_attention
from lorabank.engine.batch import Batch, Example, make_batch, pack_batch, send
from lorabank.engine.head import SplitHead, logits_of
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.packed_attention import BOUNDARIES, boundary_mask
from lorabank.errors import ConfigError, Setting

SHORT = 6
"""Tokens of the longest example of a probe whose model has no window, or none that matters."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class PackedTensors:
    """Where the examples of a batch are."""

    cu_S: Tensor
    """int32 (S + 1,): cumulative lengths over the rows laid end to end."""
    positions_NL: Tensor
    """int64: each token's place in its example; in padding, its place in the padding."""


def packed_tensors(batch: Batch, device: torch.device) -> PackedTensors:
    """Made of what the host knows of the batch, without waiting for the device."""
    rows, length = batch.input_ids_NL.shape
    lengths: list[int] = []
    for row, own in enumerate(batch.segments or [(n,) for n in batch.lengths]):
        lengths += own
        if batch.lengths[row] < length:
            lengths.append(length - batch.lengths[row])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    starts = ends[:-1].repeat_interleave(torch.tensor(lengths))
    positions_NL = (torch.arange(rows * length) - starts).view(rows, length)
    return PackedTensors(send(ends.to(torch.int32), device), send(positions_NL, device))


def _by_attention(model: nn.Module, packed: PackedTensors, rows: int, length: int) -> dict[str, Any]:
    """Boundaries as a tensor, for our own attention function."""
    return {"attention_mask": None, BOUNDARIES: packed.cu_S}


def _by_mask(model: nn.Module, packed: PackedTensors, rows: int, length: int) -> dict[str, Any]:
    """A boolean mask (N, 1, L, L), as torch's attention takes it; by kind of layer where a model mixes them."""
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else PreTrainedConfig()
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    masks = {
        kind: boundary_mask(packed.cu_S, rows, length, window=window if kind == "sliding_attention" else None)
        for kind in kinds or ["full_attention" if window is None else "sliding_attention"]
    }
    return {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def _by_bias(model: nn.Module, packed: PackedTensors, rows: int, length: int) -> dict[str, Any]:
    """The same as numbers to add to the scores, for a model whose attention is its own."""
    dtype = model.dtype if isinstance(model, PreTrainedModel) else torch.get_default_dtype()

    def bias(mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    made = _by_mask(model, packed, rows, length)["attention_mask"]
    return {"attention_mask": {kind: bias(mask) for kind, mask in made.items()} if isinstance(made, dict) else bias(made)}


WAYS: Mapping[str, Callable[[nn.Module, PackedTensors, int, int], dict[str, Any]]] = {
    "attention": _by_attention,
    "mask": _by_mask,
    "bias": _by_bias,
}
"""Name to (model, boundaries, rows, length) → what the model's forward gets, in the order in which they are tried."""


@dataclass(frozen=True)
class Packing:
    """The way that a model takes packed rows."""

    model: nn.Module
    way: str
    """A name in `WAYS`."""

    @property
    def by_attention(self) -> bool:
        """Whether our own attention function must be in place."""
        return self.way == "attention"

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the model's forward gets beside the tokens, on their device."""
        packed = packed_tensors(batch, batch.input_ids_NL.device)
        made = WAYS[self.way](self.model, packed, *batch.input_ids_NL.shape)
        return {**made, "position_ids": packed.positions_NL}


def windows(model: nn.Module, length: int) -> tuple[int, ...]:
    """Sizes of the model's windows that rows of `length` tokens reach beyond."""
    configs = [vars(module).get("config") for module in model.modules()]
    sizes = {getattr(c, name, None) for c in configs if isinstance(c, PreTrainedConfig) for name in _WINDOWS}
    return tuple(sorted(size for size in sizes if isinstance(size, int) and 0 < size < length))


def find_packing(bank: AdapterBank, split: SplitHead | None, length: int) -> Packing:
    """The first way in which packed examples of at most `length` tokens give what they give in rows of their own.

    Seen on a probe of three rows. Raises ConfigError for a model that packing isn't possible for.
    """
    model, modules = bank.model, list(bank.model.modules())
    rows = _probe_rows(model, split, windows(model, length), length)
    packed, plain = pack_batch(rows).to(bank.device), make_batch([example for row in rows for example in row]).to(bank.device)
    reasons: list[str] = []
    with torch.no_grad(), evaluation_mode(modules), bank.route(BASE):
        with own_attention(modules, bank.device):
            out = _outputs(model, split, plain, {"attention_mask": plain.attention_mask_NL})
        expected = torch.cat([out[row, start:stop] for row, start, stop in plain.spans])
        for way in WAYS:
            packing = Packing(model, way)
            if packing.by_attention and not _takes_ours(modules):
                reasons.append(f"{way}: the model has an attention of its own")
                continue
            with own_attention(modules, bank.device, packed=packing.by_attention):
                try:
                    out = _outputs(model, split, packed, packing.arguments(packed))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # noqa: BLE001  whatever a model makes of a mask it can't take; told below
                    reasons.append(f"{way}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                    continue
            found = torch.cat([out[row, start:stop] for row, start, stop in packed.spans])
            off = float((found - expected).norm() / expected.norm())
            if off <= (1e-4 if found.dtype == torch.float32 and _is_single(model) else 5e-2):
                return packing
            reasons.append(f"{way}: outputs differ by {off:.1%}")
    raise ConfigError(
        Setting("data.packing"),
        f": {type(model).__name__} can't take packed rows: on a probe, examples in one row didn't give what they give in rows of "
        f"their own ({'; '.join(reasons)}). Set ",
        Setting("data.packing"),
        ": false; batches are bucketed by length then.",
    )


def _takes_ours(modules: Sequence[nn.Module]) -> bool:
    """Whether every configuration that the modules read can name our attention."""
    found = configurations(modules)
    return bool(found) and all(config._attn_implementation == "sdpa" for config in found)


def _is_single(model: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())


def _outputs(model: nn.Module, split: SplitHead | None, batch: Batch, arguments: dict[str, Any]) -> Tensor:
    """Last hidden states, or logits where they can't be had, fp32."""
    mask, more = arguments["attention_mask"], {name: value for name, value in arguments.items() if name != "attention_mask"}
    if split is not None:
        return split.hidden(batch.input_ids_NL, mask, **more).float()
    return logits_of(model, batch.input_ids_NL, mask, **more).float()


def _probe_rows(model: nn.Module, split: SplitHead | None, sizes: Sequence[int], length: int) -> list[list[Example]]:
    """Rows of examples of unlike lengths, the longest well beyond every window; one row is padded, one is one example."""
    longest = max([SHORT, *(min(2 * size + 3, length) for size in sizes)])
    vocabulary = split.head.out_features if split is not None else SHORT
    draw = torch.Generator().manual_seed(0)
    lengths = [[3, longest, 1], [longest, 2], [4]]
    return [[(torch.randint(max(2, vocabulary), (n,), generator=draw).tolist(), [1.0] * n) for n in own] for own in lengths]
