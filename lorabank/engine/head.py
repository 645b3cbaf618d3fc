"""Where a causal language model's body ends and its output head begins, so that the loss can go through the head in chunks.

The split is believed only after a probe: body and head apart must give the model's own logits, bit for bit. Scales and caps that
a configuration names are tried; a model that does anything else between them, or whose logits on the probe are too small to tell,
takes the plain path, which holds all logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE
from lorabank.bank.wrapping import Adapted
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import ConfigError, DataError
from lorabank.kernels.logit_shape import LogitShape

PROBE_TOKENS = 4
PLAIN_OUTPUTS = {"return_dict": True, "output_router_logits": False}
"""Asked of every model that knows them: a mixture of experts computes an auxiliary loss only from its router's logits."""


FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping",)
"""Where configurations keep what is done to logits. A name means one thing here and another there: the probe tells."""


@dataclass(frozen=True)
class SplitHead:
    """The model's body and its linear output head."""

    body: nn.Module
    head: nn.Linear
    shape: LogitShape | None = None
    """What the model does to the head's logits."""

    def hidden(self, input_ids: Tensor, attention_mask: Any, **more: Any) -> Tensor:
        """Last hidden states (N, L, H). `more`: what packed rows need, see packing.py."""
        out = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **more)
        return out.last_hidden_state


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, as the model itself names it, or None."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def split_head(bank: AdapterBank) -> SplitHead | None:
    """The split, checked on a probe of four tokens, or None when the model's logits are not simply head(body(x))."""
    model, head = bank.model, output_head(bank.model)
    # an adapted head must be called, and a body that is the whole model has no head to take apart
    if not isinstance(model, PreTrainedModel) or isinstance(head, Adapted) or not isinstance(head, nn.Linear):
        return None
    body = model.base_model
    if body is model or not isinstance(body, nn.Module) or not {"input_ids", "attention_mask"} <= accepted(body):
        return None
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % max(1, head.out_features)
    mask = torch.ones_like(ids)
    with torch.no_grad(), evaluation_mode(model.modules()), bank.route(BASE):
        expected = logits_of(model, ids, mask)
        out = body(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        if "last_hidden_state" not in out or out["last_hidden_state"].shape[-1] != head.in_features:
            return None
        found = head(out["last_hidden_state"].to(head.weight.dtype))
        # equal to the last bit: where logits are small, a cap is a difference of few bits, which grows with them in training
        given = [s for s in _shapes(model) if torch.equal(expected, (s(found) if s is not None else found).to(expected.dtype))]
    return SplitHead(body, head, given[0]) if len(given) == 1 else None


def _shapes(model: PreTrainedModel) -> Iterator[LogitShape | None]:
    """What may be done to logits, by the model's configuration."""
    config = model.config.get_text_config()

    def known(names: Sequence[str]) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool) and value]

    scales: list[LogitShape] = [LogitShape(factor=value) for value in known(FACTORS) if value != 1]
    scales += [LogitShape(divisor=value) for value in known(DIVISORS) if value != 1]
    for cap in known(CAPS):
        yield from (replace(scale, cap=cap) for scale in scales)
        yield LogitShape(cap=cap)
    yield from scales
    yield None


def logits_of(model: nn.Module, input_ids_NL: Tensor, attention_mask: Any, **more: Any) -> Tensor:
    """The model's own logits (N, L, V). A model of one's own returns them, or a mapping that has them as `logits`.

    `more`: what packed rows need, see packing.py.
    """
    takes = accepted(model)
    inputs = {"input_ids": input_ids_NL, "attention_mask": attention_mask, "use_cache": False, **PLAIN_OUTPUTS}
    if "input_ids" not in takes:
        raise ConfigError(
            f"{type(model).__name__}.forward takes {', '.join(sorted(takes)) or 'nothing'}; the engine gives it `input_ids` and, "
            "where taken, `attention_mask`. Name its argument so, or call the model inside bank.route(...) in a loop of your own."
        )
    out = model(**{name: value for name, value in inputs.items() if name in takes}, **more)
    return out if isinstance(out, Tensor) else out["logits"]


def accepted(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def longest_row(model: nn.Module) -> int | None:
    """Tokens that the model has positions for, as its configuration says; None where it says nothing."""
    longest = getattr(model.config, "max_position_embeddings", None) if isinstance(model, PreTrainedModel) else None
    return longest if isinstance(longest, int) else None


def end_addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the table of embeddings and the output head lie: elsewhere once the vocabulary was resized."""
    weights: list[object] = []
    if isinstance(model, PreTrainedModel):
        for find in (model.get_input_embeddings, model.get_output_embeddings):
            with contextlib.suppress(NotImplementedError):  # a model without one
                weights.append(getattr(find(), "weight", None))
    return tuple(weight.data_ptr() for weight in weights if isinstance(weight, Tensor))


def check_decoder(model: nn.Module) -> None:
    """Raise ConfigError for a model that reads one text and writes another: it has two inputs."""
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder model, which has two inputs: batches of tokens can't train it, "
            "and `sample` can't continue it. Use one of lorabank's tasks for such models, or a loop of your own."
        )


def check_vocabulary(model: nn.Module, largest_id: int) -> None:
    """Raise DataError when a token id lies outside the model's table of embeddings."""
    if not isinstance(model, PreTrainedModel):
        return
    with contextlib.suppress(NotImplementedError):  # a model without such a table
        table = model.get_input_embeddings()
        if isinstance(table, nn.Embedding) and largest_id >= table.num_embeddings:
            raise DataError(
                f"token id {largest_id} is outside the vocabulary of {type(model).__name__} ({table.num_embeddings} entries). "
                "Tokenizer and model don't belong together."
            )
