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
from lorabank.engine.attention import configurations, head_kinds, own_attention, reached_windows
from lorabank.engine.batch import Batch, Example, PackedTensors, make_batch, pack_batch, send
from lorabank.engine.head import SplitHead, logits_of
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.packed_attention import BOUNDARIES, boundary_mask
from lorabank.engine.parts import is_out_of_memory
from lorabank.engine.varlen import varlen_missing
from lorabank.errors import ConfigError, Setting
from lorabank.notices import warn_once

SHORT = 6
"""Tokens of the longest example of a probe whose model has no window, or none that matters."""


def packed_tensors(batch: Batch, device: torch.device, *, spans: int = 0) -> PackedTensors:
    """Made of what the host knows of the batch, without waiting for the device.

    `spans`: so many at least; those that there aren't are empty, so that shapes are few.
    """
    if batch.boundaries is not None:
        return batch.boundaries
    rows, length = batch.input_ids_NL.shape
    lengths: list[int] = []
    for row, own in enumerate(batch.segments or [(n,) for n in batch.lengths]):
        lengths += own
        if batch.lengths[row] < length:
            lengths.append(length - batch.lengths[row])
    lengths += [0] * (spans - len(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    starts = ends[:-1].repeat_interleave(torch.tensor(lengths))
    real_NL = torch.arange(length) < torch.tensor(batch.lengths)[:, None]
    positions_NL = (torch.arange(rows * length) - starts).view(rows, length) * real_NL
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
    return reached_windows([config for config in configs if isinstance(config, PreTrainedConfig)], length)


def find_packing(bank: AdapterBank, split: SplitHead | None, length: int) -> Packing:
    """The first way in which packed examples of at most `length` tokens give what they give in rows of their own.

    Seen on a probe of three rows: outputs are compared, and no output may have a gradient in another example's tokens. Raises
    ConfigError for a model that packing isn't possible for.
    """
    model, reasons = bank.model, []
    with evaluation_mode(list(model.modules())), bank.route(BASE):
        for way in WAYS:
            reason = _objection(bank, split, Packing(model, way), length)
            if reason is None:
                _tell_of_masks(bank, way)
                return Packing(model, way)
            reasons.append(f"{way}: {reason}")
    raise ConfigError(
        Setting("data.packing"),
        f": {type(model).__name__} can't take packed rows: on a probe, examples in one row didn't give what they give in rows of "
        f"their own ({'; '.join(reasons)}). Set ",
        Setting("data.packing"),
        ": false; batches are bucketed by length then.",
    )


def _tell_of_masks(bank: AdapterBank, way: str) -> None:
    """Say, on a GPU, that packed rows of this model take masks, where they do."""
    if bank.device.type != "cuda":
        return
    why: str | None = "the model's attention takes nothing else"
    if way == "attention":
        sizes = {size for size, _ in head_kinds(configurations(list(bank.model.modules())))}
        dtypes = {p.dtype for p in bank.model.parameters() if p.is_floating_point() and p.element_size() > 1}
        missing = [varlen_missing(bank.device, dtype, size) for size in sizes for dtype in dtypes]
        if all(missing) and missing:
            why = f"torch's variable-length attention isn't for it: {missing[0]}"
        else:
            return
    warn_once(
        f"packed rows of {type(bank.model).__name__} take a mask in every attention, whose memory and time grow with the square "
        f"of a row's length: {why}. Shorter packed rows cost less."
    )


def _objection(bank: AdapterBank, split: SplitHead | None, packing: Packing, length: int) -> str | None:
    """Why this way isn't right for the model, or None."""
    model, modules = bank.model, list(bank.model.modules())
    if not isinstance(model, PreTrainedModel):
        return "not a model of transformers"
    if packing.by_attention and not _takes_ours(modules):
        return "the model has an attention of its own"
    rows = _probe_rows(model, split, windows(model, length), length)
    packed, plain = pack_batch(rows).to(bank.device), make_batch([example for row in rows for example in row]).to(bank.device)
    with torch.no_grad(), own_attention(modules, bank.device):
        out = _outputs(model, split, plain, {"attention_mask": plain.attention_mask_NL})
    expected = [out[row, start:stop] for row, start, stop in plain.spans]
    short = pack_batch(_probe_rows(model, split, (), length)).to(bank.device)
    with own_attention(modules, bank.device, packed=packing.by_attention):
        try:
            with torch.no_grad():
                out = _outputs(model, split, packed, packing.arguments(packed))
            sees = _sees_another(model, split, packing, short)
        except Exception as error:  # whatever a model makes of a mask it can't take: it is told
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    off = _difference([out[row, start:stop] for row, start, stop in packed.spans], expected, packed.spans)
    if not off <= (1e-3 if _is_single(model) else 5e-2):
        return f"outputs differ by {off:.1%}"
    return "an example sees another" if sees else None


def _sees_another(model: PreTrainedModel, split: SplitHead | None, packing: Packing, batch: Batch) -> bool:
    """Whether an output of the batch has a gradient in another example's tokens: exact, however coarse the model's dtype."""
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        # a compiled block would be compiled for these few tokens
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            out = _outputs(model, split, batch, packing.arguments(batch))
            for row, start, stop in batch.spans:
                own = out[row, start:stop]
                weights = torch.linspace(-1, 1, own.numel(), device=own.device).view_as(own)  # a plain sum may be constant
                (gradient,) = torch.autograd.grad((own * weights).sum(), embedded, retain_graph=True)
                if not bool(gradient[row, start:stop].any()):
                    return True  # no gradient at all shows nothing
                gradient[row, start:stop] = 0
                if bool((gradient != 0).any()):
                    return True
    finally:
        handle.remove()
    return False


def _takes_ours(modules: Sequence[nn.Module]) -> bool:
    """Whether every configuration that the modules read can name our attention."""
    found = configurations(modules)
    return bool(found) and all(config._attn_implementation == "sdpa" for config in found)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], spans: Sequence[tuple[int, int, int]]) -> float:
    """Relative difference of a token's outputs, the median of the worst group of tokens.

    Tokens of a row's first example, of the examples behind it, and those that lie late in their example, where a window ends:
    what is wrong with boundaries, positions or windows is wrong with all of one group. A median, since rounding may send single
    tokens to other experts.
    """
    size = torch.cat(list(expected)).norm(dim=-1).median()  # of a padding token's embedding it may be zero
    off = [(f - e).norm(dim=-1) / e.norm(dim=-1).clamp(min=size / 100) for f, e in zip(found, expected, strict=True)]
    firsts = [error for error, (_, start, _) in zip(off, spans, strict=True) if start == 0]
    behind = [error for error, (_, start, _) in zip(off, spans, strict=True) if start]
    late = [error[(len(error) + 1) // 2 :] for error in off]
    return float(torch.stack([torch.cat(group).median() for group in (firsts, behind, late)]).max())  # NaN, if any is


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
