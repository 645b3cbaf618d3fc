"""`sample`: text from a causal language model, each row with its own adapter and seed, in one batch.

Rows that have ended leave the batch, so a short answer doesn't pay for a long one beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.sampling import RowSamplers, SamplingConfig
from lorabank.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One row's answer."""

    tokens: tuple[int, ...]
    """Without the end token."""
    logprobs: tuple[float, ...]
    """Of each chosen token (the end token's last, when there is one), at temperature 1."""
    route: RowRoute
    structure: int
    """The bank's structure count while sampling: with the adapter's step count it says which version spoke."""
    ended: bool
    """Whether an end token came before `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """One step of one row, for streaming."""

    row: int
    token: int
    logprob: float
    last: bool
    """The row is done after this token; an end token itself is not part of the answer."""
    is_end: bool


def sample(
    bank: AdapterBank,
    prompts: Sequence[Sequence[int]],
    routes: Sequence[RowRoute],
    *,
    config: SamplingConfig | None = None,
    end_ids: Sequence[int] = (),
    pad_id: int = 0,
    seeds: Sequence[int] | None = None,
) -> list[Sampled]:
    """Answers to token-id prompts, one route a row. `seeds`: one a row; the same row and seed draw the same in any batch."""
    tokens: list[list[int]] = [[] for _ in prompts]
    logs: list[list[float]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for new in stream(bank, prompts, routes, config=config, end_ids=end_ids, pad_id=pad_id, seeds=seeds):
        logs[new.row].append(new.logprob)
        ended[new.row] = new.is_end
        if not new.is_end:
            tokens[new.row].append(new.token)
    return [
        Sampled(tokens=tuple(t), logprobs=tuple(lp), route=route, structure=bank.structure, ended=end)
        for t, lp, route, end in zip(tokens, logs, routes, ended, strict=True)
    ]


def stream(
    bank: AdapterBank,
    prompts: Sequence[Sequence[int]],
    routes: Sequence[RowRoute],
    *,
    config: SamplingConfig | None = None,
    end_ids: Sequence[int] = (),
    pad_id: int = 0,
    seeds: Sequence[int] | None = None,
) -> Iterator[NewToken]:
    """`sample`, a token at a time, rows in order within each step."""
    config = config or SamplingConfig()
    model = bank.model
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"sample: {type(model).__name__} is no transformers model; call it in your own loop inside bank.route(...)")
    if not prompts or any(not prompt for prompt in prompts):
        raise DataError("sample: every prompt needs at least one token")
    if len(routes) != len(prompts) or (seeds is not None and len(seeds) != len(prompts)):
        raise DataError(f"sample: {len(prompts)} prompts need as many routes (got {len(routes)}) and seeds")
    samplers = RowSamplers(config, list(range(len(prompts)) if seeds is None else seeds))
    ends = frozenset(end_ids)
    with torch.no_grad(), evaluation_mode(model):
        state = _Decoding.start(bank, prompts, list(routes), pad_id)
        finished: set[int] = set()
        for step in range(config.max_new_tokens):
            tokens, logs = samplers.choose(state.logits_NV, state.rows)
            for row, token, log in zip(state.rows, tokens.tolist(), logs.tolist(), strict=True):
                if row in finished:
                    continue
                is_end = token in ends
                last = is_end or step == config.max_new_tokens - 1
                if last:
                    finished.add(row)
                yield NewToken(row=row, token=token, logprob=log, last=last, is_end=is_end)
            if len(finished) == len(prompts):
                return
            running = [i for i, row in enumerate(state.rows) if row not in finished]
            if state.can_shrink and len(running) < len(state.rows):
                state, tokens = state.only(running), tokens[torch.tensor(running, device=tokens.device)]
            state = state.advance(tokens)


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """The running batch. Prompts are padded on the left, so that every row's next token is the last column."""

    bank: AdapterBank
    rows: list[int]
    routes: list[RowRoute]
    mask_NL: Tensor
    cache: Any
    logits_NV: Tensor
    accepts: frozenset[str]
    can_shrink: bool
    """Whether the cache can drop rows; other kinds of cache keep ended rows to the end."""

    @classmethod
    def start(cls, bank: AdapterBank, prompts: Sequence[Sequence[int]], routes: list[RowRoute], pad_id: int) -> _Decoding:
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=bank.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=bank.device)
        accepts = frozenset(inspect.signature(bank.model.forward).parameters)
        empty = torch.empty(len(prompts), 0)
        state = cls(
            bank=bank, rows=list(range(len(prompts))), routes=routes, mask_NL=mask, cache=None, logits_NV=empty, accepts=accepts, can_shrink=False
        )
        return state._forward(ids, mask)

    def advance(self, tokens_N: Tensor) -> _Decoding:
        """Append a token a row and run the model on it."""
        mask = torch.cat([self.mask_NL, torch.ones_like(self.mask_NL[:, :1])], 1)
        return self._forward(tokens_N[:, None], mask)

    def only(self, keep: list[int]) -> _Decoding:
        """Drop every other row from the batch."""
        index = torch.tensor(keep, device=self.mask_NL.device)
        self.cache.batch_select_indices(index)
        return replace(self, rows=[self.rows[i] for i in keep], routes=[self.routes[i] for i in keep], mask_NL=self.mask_NL[index])

    def _forward(self, ids: Tensor, mask: Tensor) -> _Decoding:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True, "past_key_values": self.cache}
        if "position_ids" in self.accepts:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = 1
        with self.bank.route(self.routes):
            out = self.bank.model(**inputs)
        return replace(
            self, mask_NL=mask, cache=out.past_key_values, logits_NV=out.logits[:, -1], can_shrink=type(out.past_key_values) is DynamicCache
        )
