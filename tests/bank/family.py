"""What a model family is to the tests over all of them, the inputs that they share, and how a family's answer is compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PretrainedConfig

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from tests.bank.tiny import fill

ROWS = 3
"""No other size of the tiny models' inputs: a dimension of this size is the rows'."""
MIXED: Sequence[RowRoute] = ["a", BASE, "a"]
WORDS = 61
TOKENS: Mapping[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: Mapping[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE: Mapping[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
TWO_SIDES: Mapping[str, Any] = {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))
}
Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny model of one family, and what is known of it."""

    kind: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    targets: Sequence[str] = ("all-linear",)
    exclude: Sequence[str] = ()
    left: str = ""
    """Part of the error that `all-linear` alone raises in `add` or at the first forward; empty where it means every layer."""
    apart: str = ""
    """Part of the error that one route a row raises; empty where rows are told apart."""
    mixes: bool = False
    """Whether a row's own output depends on the other rows, so that rows can't be compared."""
    peft: Sequence[str] = ()
    """Layers that PEFT can't adapt as they are used here, left out where it is the reference."""


def built(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model class of transformers and its configuration's, by name."""

    def make() -> nn.Module:
        if model not in dir(hf):
            pytest.skip(f"transformers {hf.__version__} has no {model}")
        made: PretrainedConfig = getattr(hf, config)(**sizes)
        return getattr(hf, model)(made)

    return make


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(tokens: int = 7) -> Tensor:
    return torch.randint(14, 50, (ROWS, tokens), generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.ones(ROWS, 7, dtype=torch.int64)}


def ids_alone() -> dict[str, Any]:
    return {"input_ids": ids()}


def text_pair() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def pictures(size: int = 16) -> Inputs:
    return lambda: {"pixel_values": random(ROWS, 3, size, size)}


def video() -> dict[str, Any]:
    return {"pixel_values": random(ROWS, 2, 3, 16, 16)}


def wave(samples: int = 800) -> Inputs:
    return lambda: {"input_values": random(ROWS, samples)}


def with_pictures(given: Inputs, size: int = 16) -> Inputs:
    return lambda: {**given(), **pictures(size)()}


def in_place_of_tokens(count: int, token: int = 60) -> Inputs:
    """Pictures, and text that begins with a place for each of a picture's `count` features."""
    return lambda: {"input_ids": torch.cat([torch.full((ROWS, count), token), ids()], 1), **pictures()()}


def named(kind: str, model: str, inputs: Inputs = text, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    """Of a model class whose configuration has its name. `known`: the family's other fields."""
    name = re.split(r"For(?=[A-Z])", model)[0].removesuffix("LMHeadModel").removesuffix("MTModel").removesuffix("Model")
    return Family(kind=kind, make=built(model, f"{name}Config", **sizes), inputs=inputs, **(known or {}))


def made(family: Family) -> nn.Module:
    """In evaluation mode, with the same weights each time, not as small as at a start of training."""
    torch.manual_seed(0)
    model = family.make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.25)
    return model


def bank_of(family: Family, *, exclude: Sequence[str] = ()) -> AdapterBank:
    """A bank over the family's model with adapter `a`, which does something."""
    bank = attach(made(family))
    config = AdapterConfig(rank=2, alpha=4, targets=list(family.targets), exclude=[*family.exclude, *exclude], modules_to_save=[])
    bank.add("a", config)
    fill(bank, "a")
    return bank


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


_NO_ANSWERS = ("past_key_values", "cache_params", "state", "logits_per_image", "logits_per_text")
"""Caches, and what compares each row with each other."""


def answers(model: nn.Module, family: Family) -> list[Tensor]:
    """Every finite tensor of floats in what the model gives, caches aside."""
    torch.manual_seed(0)  # for models that draw noise
    output = model(**family.inputs())
    found = _tensors({key: value for key, value in output.items() if key not in _NO_ANSWERS})
    return [t for t in found if t.is_floating_point() and t.ndim and t.numel() and bool(t.isfinite().all())]


def loss(found: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
    """A number that each answer's elements are in with weights of their own; of some rows alone."""
    total = torch.zeros(())
    for t in found:
        if t.requires_grad and (rows is None or len(t) == ROWS):
            mine = t if rows is None else t[list(rows)]
            size = max(1.0, float(mine.detach().abs().max()) * mine.numel() ** 0.5)
            total = total + (mine * random(*mine.shape, seed=1)).sum() / size
    return total


def check_close(mine: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Answers are the same, to rounding."""
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        size = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)


def check_gradients(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Every gradient is the same, to the rounding of the largest ones."""
    assert mine.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in other.values())
    assert largest > 0
    for key, g in other.items():
        size = max(float(g.abs().max()), 1e-3 * largest)
        off = float((mine[key] - g).abs().max()) / size
        assert off <= 1e-3, (key, off, size, largest)
