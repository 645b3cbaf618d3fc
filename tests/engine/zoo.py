"""Tiny random models of eight families, with inputs and outputs of their own kinds, for loops of one's own on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import RowRoute
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.head import accepted
from tests.engine.tiny import clear, difference, gradients

MIXED: Sequence[RowRoute] = ["a", "b", BASE, "a"]
ROWS = len(MIXED)
WORDS = 61
Batch = dict[str, Tensor]
LossOf = Callable[[Mapping[str, Tensor]], Tensor]
LIKE: Sequence[Sequence[RowRoute]] = [
    MIXED,
    ["b", BASE, "a", "a"],
    [BASE, "a", "a", "b"],
    ["a", "a", "b", BASE],
    ["a", BASE, "b", "a"],
]
"""Routes of as many rows for each adapter."""
STRONG, USUAL = 16.0, 1.0
"""Adapters' alpha: their change is 5 to 10 times the frozen product in gpt2 of width 128; 0.3 to 0.6 times."""
_TOKENS: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _encoder(width: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": width * 3 // 2}


def _decoder(width: int) -> dict[str, Any]:
    return {**_encoder(width), "num_key_value_heads": 2, "max_position_embeddings": 128, **_TOKENS}


def _whisper(width: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", width * 3 // 2))
    }
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            d_model=width,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=128,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **sizes,
            **_TOKENS,
        )
    )


def _text(g: torch.Generator, length: int) -> dict[str, Tensor]:
    mask = torch.ones(ROWS, length, dtype=torch.int64)
    mask[1, length - 2 :] = 0
    return {"input_ids": torch.randint(14, WORDS, (ROWS, length), generator=g), "attention_mask": mask}


def _pictures(g: torch.Generator, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=g)}


def _speech(g: torch.Generator, length: int) -> dict[str, Tensor]:
    heard = torch.randn(ROWS, 8, 24, generator=g)
    return {"input_features": heard, "decoder_input_ids": torch.randint(14, WORDS, (ROWS, length), generator=g)}


@dataclass(frozen=True)
class Family:
    """A model, what goes in, and the classes of the blocks that it repeats."""

    make: Callable[[int], PreTrainedModel]
    """Width → the model."""
    blocks: Mapping[str, int]
    inputs: Callable[[torch.Generator, int], dict[str, Tensor]] = _text
    """(generator, tokens) → arguments of the model."""


ZOO: Mapping[str, Family] = {
    "llama": Family(lambda w: hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder(w))), {"LlamaDecoderLayer": 2}),
    "qwen3": Family(lambda w: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(w), head_dim=w // 4)), {"Qwen3DecoderLayer": 2}),
    "gemma3": Family(
        lambda w: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **_decoder(w),
                head_dim=w // 4,
                query_pre_attn_scalar=w // 4,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        {"Gemma3DecoderLayer": 2},
    ),
    "mistral": Family(
        lambda w: hf.MistralForCausalLM(hf.MistralConfig(**_decoder(w), sliding_window=5)), {"MistralDecoderLayer": 2}
    ),
    "gpt2": Family(
        lambda w: hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=128, n_embd=w, n_layer=2, n_head=4, **_TOKENS)), {"GPT2Block": 2}
    ),
    "bert": Family(
        lambda w: hf.BertForSequenceClassification(hf.BertConfig(**_encoder(w), **_TOKENS, num_labels=3)), {"BertLayer": 2}
    ),
    "vit": Family(
        lambda w: hf.ViTForImageClassification(hf.ViTConfig(**_encoder(w), image_size=16, patch_size=4, num_labels=3)),
        {"ViTLayer": 2},
        _pictures,
    ),
    "whisper": Family(_whisper, {"WhisperEncoderLayer": 2, "WhisperDecoderLayer": 2}, _speech),
}


@dataclass(frozen=True)
class Paths:
    """Which way each call took, in order."""

    fused: list[nn.Module] = field(default_factory=list)
    """Blocks whose products were compiled into them."""
    eager: list[str] = field(default_factory=list)
    """Adapted layers that computed their product themselves."""


def watch(monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Note from now on which way calls take."""
    paths, run, alone = Paths(), FusedBlock._run, LoRALayer._adapted

    def noted(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        paths.fused.append(self.block)
        return run(self, *args, **kwargs)

    def noted_alone(self: LoRALayer, x: Tensor) -> Tensor:
        paths.eager.append(self.path)
        return alone(self, x)

    monkeypatch.setattr(FusedBlock, "_run", noted)
    monkeypatch.setattr(LoRALayer, "_eager", torch.compiler.disable(noted_alone))
    return paths


def bank_of(
    family: str,
    names: Mapping[str, int],
    *,
    width: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    targets: str | Sequence[str] = "all-linear",
    alpha: float = STRONG,
) -> AdapterBank:
    """A bank over a model that is the same each time; `names` to ranks, each adapter doing something already."""
    torch.manual_seed(0)
    model: nn.Module = ZOO[family].make(width).eval()
    bank = attach(model.to(device, dtype))
    for name, rank in names.items():
        seed = sum(name.encode())
        bank.add(name, AdapterConfig(rank=rank, alpha=alpha, targets=targets), seed=seed)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in bank.parameters(name):
                p.add_((torch.randn(p.shape, generator=g) * 0.1).to(p))
    return bank


def outputs(bank: AdapterBank, family: str, *, length: int = 7, seed: int = 0) -> Tensor:
    """The model's logits for random inputs, one row an input."""
    like = next(p for p in bank.model.parameters() if p.is_floating_point())
    given = ZOO[family].inputs(torch.Generator().manual_seed(seed), length)
    uncached = {"use_cache": False} if "use_cache" in accepted(bank.model) else {}
    moved = {name: v.to(like) if v.is_floating_point() else v.to(like.device) for name, v in given.items()}
    return bank.model(**moved, **uncached).logits


def weighed(logits: Tensor) -> Tensor:
    """A sum that every logit enters differently."""
    return (logits.float() * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum()


def check_fused(
    family: str,
    fuse: Callable[[nn.Module], object],
    paths: Paths,
    *,
    width: int,
    tolerance: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    targets: str | Sequence[str] = "all-linear",
    lengths: Sequence[int] = (7,),
) -> None:
    """Assert that fused blocks compute what plain ones do, outputs and every gradient, and that all of them are in fact fused.

    `tolerance` as `difference` has it for fp32. In half precision two right paths differ by about what each is off by, which
    depends on the model, so there it isn't used: fused blocks may be `HALF` times as far from fp32 as plain ones, with the same
    weights and `USUAL` adapters, in all logits and in all gradients of `INPUTS` inputs as one vector each.
    """
    given: dict[str, Any] = {"width": width, "device": device, "targets": targets}
    given["alpha"] = STRONG if dtype == torch.float32 else USUAL
    plain, fused = (bank_of(family, {"a": 2, "b": 3}, dtype=dtype, **given) for _ in range(2))
    banks = {"plain": plain, "fused": fused}
    if dtype != torch.float32:
        banks["exact"] = in_fp32(plain, family, **given)
    blocks = repeated_blocks(fused.model)
    inside = {m.path for block in blocks for m in block.modules() if isinstance(m, LoRALayer)}
    with torch.no_grad(), fused.route("a"):
        outputs(fused, family)  # every layer has been reached: until then a block runs plainly
    fuse(fused.model)
    adapted = {id(block) for block in blocks if any(isinstance(m, LoRALayer) for m in block.modules())}
    for length in lengths:
        passes: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = {}
        for which, bank in banks.items():
            passes[which] = []
            for seed in range(1 if dtype == torch.float32 else INPUTS):
                paths.fused.clear()
                paths.eager.clear()
                passes[which].append(one_pass(bank, family, length, seed))
                if bank is fused:
                    assert sorted(map(id, paths.fused)) == sorted(adapted)
                    assert not inside & set(paths.eager)
        if dtype == torch.float32:
            ((mine, found),), ((other, expected),) = passes["fused"], passes["plain"]
            assert off(mine, other) < tolerance
            assert difference(found, expected) < tolerance
            continue
        logits = {which: torch.cat([y.flatten() for y, _ in passes[which]]) for which in banks}
        vectors = {which: torch.cat([g[key].flatten() for _, g in passes[which] for key in sorted(g)]) for which in banks}
        for what, results in (("logits", logits), ("gradients", vectors)):
            usual, mine = (off(results[which], results["exact"]) for which in ("plain", "fused"))
            assert usual < 0.25, "rounding this model to half precision leaves nothing to compare"
            assert mine <= HALF * usual + 1e-4, f"{what} {mine:.1e} from fp32, plain blocks {usual:.1e}"


HALF = 1.5
"""How much further from fp32 than plain blocks' may results of fused blocks lie in half precision, with `USUAL` adapters.

Kernels round A, B and xA, as products in half precision do; plain blocks keep them in fp32 and round y alone. Where the change is
all of y (`STRONG`) that is 1.6 times as far in bf16, 3 times for some inputs; with `USUAL` adapters 1.0 times, 1.35 at most for
gradients of one input. A scaling that is off by 3 % makes it 2.3 times, a dA or dB by 10 % five times.
"""
INPUTS = 4
"""Inputs that results in half precision are taken from, together: those of one scatter."""


def in_fp32(bank: AdapterBank, family: str, **given: Any) -> AdapterBank:
    """A bank in fp32 with the weights and adapters of one in half precision. `given`: the other arguments of its `bank_of`."""
    made = bank_of(family, {name: bank.config(name).rank for name in bank.names}, **given)
    with torch.no_grad():
        for mine, theirs in zip(
            (*made.model.parameters(), *made.model.buffers()), (*bank.model.parameters(), *bank.model.buffers()), strict=True
        ):
            mine.copy_(theirs)
    return made


def one_pass(bank: AdapterBank, family: str, length: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient, fp32."""
    with bank.route(MIXED):
        logits = outputs(bank, family, length=length, seed=seed)
    weighed(logits).backward()
    found = {f"{name} {key}": g.float() for name in ("a", "b") for key, g in gradients(bank, name).items()}
    assert len(found) == len(bank.parameters())
    assert all(bool(g.isfinite().all()) for g in found.values())
    clear(bank)
    return logits.detach().float(), found


def off(mine: Tensor, other: Tensor) -> float:
    """Relative to the other's norm."""
    return float((mine - other).norm() / other.norm())


def batch_of(family: str, seed: int, length: int = 7) -> Batch:
    """Inputs and `targets`: a class for each row, the next tokens for Whisper."""
    g = torch.Generator().manual_seed(seed)
    inputs = ZOO[family].inputs(g, length)
    labels = inputs["decoder_input_ids"].roll(-1, 1) if family == "whisper" else torch.randint(3, (ROWS,), generator=g)
    return {**inputs, "targets": labels}


def loss_of(model: Callable[..., Any], *, rows: bool = False) -> LossOf:
    """The mean loss of each row, or the sum of them."""

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        cache = {"use_cache": False} if "decoder_input_ids" in batch else {}
        logits = model(**{name: value for name, value in batch.items() if name != "targets"}, **cache).logits.float()
        targets = batch["targets"]
        each = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(len(targets), -1).mean(1)
        return each if rows else each.sum()

    return loss


def plainly(bank: AdapterBank, loss: LossOf, batch: Batch, route: Any) -> Tensor:
    """A pass of a plain loop."""
    with bank.route(route):
        found = loss(batch)
    found.sum().backward()
    return found.detach()


def reached(bank: AdapterBank, family: str) -> AdapterBank:
    """Its layers, by a pass before: until then a block runs plainly."""
    with torch.no_grad(), bank.route("a"):
        outputs(bank, family)
    return bank
