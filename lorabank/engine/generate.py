"""`sample`: text from a causal language model, each row with its own adapter and seed, in one batch.

Rows that have ended leave the batch, so a short answer doesn't pay for a long one beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import Routing, RowRoute
from lorabank.engine.head import PLAIN_OUTPUTS, accepted, check_decoder, check_vocabulary
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.rows import row_routing
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
    """`sample`, a token at a time, rows in order within each step.

    Between tokens the caller's own modes are in force: gradients, training mode and routes are touched only while the model runs.
    """
    config = config or SamplingConfig()
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    _check(bank.model, prompts, routes, seeds)
    states = _start(bank, prompts, list(routes), pad_id)
    return _tokens(states, RowSamplers(config, seeds), config, frozenset(end_ids))


def _tokens(states: list[_Decoding], samplers: RowSamplers, config: SamplingConfig, ends: frozenset[int]) -> Iterator[NewToken]:
    running = {row for state in states for row in state.rows}
    for step in range(1, config.max_new_tokens + 1):
        new: list[NewToken] = []
        for place, state in enumerate(states):
            state = state.predict()
            tokens, logs = samplers.choose(state.logits_NV, state.rows)
            states[place] = state.append(tokens)
            for row, token, log in zip(state.rows, tokens.tolist(), logs.tolist(), strict=True):
                is_end = token in ends
                last = is_end or step == config.max_new_tokens
                new.append(NewToken(row=row, token=token, logprob=log, last=last, is_end=is_end))
        new = sorted((token for token in new if token.row in running), key=lambda token: token.row)
        running -= {token.row for token in new if token.last}
        yield from new
        states = [state.only(running) for state in states if running.intersection(state.rows)]
        if not states:
            return


def _start(bank: AdapterBank, prompts: Sequence[Sequence[int]], routes: list[RowRoute], pad_id: int) -> list[_Decoding]:
    """One batch, padded on the left; or, where the model can't be told each token's position, one batch for each length."""
    takes = accepted(bank.model)
    rows = list(range(len(prompts)))
    groups = [rows]
    if not {"past_key_values", "position_ids"} <= takes:
        groups = [[row for row in rows if len(prompts[row]) == n] for n in sorted({len(p) for p in prompts})]
    return [
        _Decoding.start(bank, takes, group, [prompts[i] for i in group], [routes[i] for i in group], pad_id) for group in groups
    ]


def _check(model: nn.Module, prompts: Sequence[Sequence[int]], routes: Sequence[RowRoute], seeds: Sequence[int]) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"sample: {type(model).__name__} is no transformers model. Call it in a loop of your own inside bank.route(...)."
        )
    check_decoder(model)
    if not model.can_generate():
        raise ConfigError(f"sample: {type(model).__name__} can't generate text: it has no causal language-model head")
    if not prompts or any(not prompt for prompt in prompts):
        raise DataError("sample: every prompt needs at least one token")
    if isinstance(routes, str) or len(routes) != len(prompts) or len(seeds) != len(prompts):
        raise DataError(f"sample: {len(prompts)} prompts need a route each and a seed each, got {len(routes)} and {len(seeds)}")
    check_vocabulary(model, max(max(prompt) for prompt in prompts))


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """The running batch. Prompts are padded on the left, so that every row's next token is the last column.

    A model whose cache isn't transformers' `past_key_values` is run on the whole text for every token: slow, and right.
    """

    bank: AdapterBank
    modules: tuple[nn.Module, ...]
    takes: frozenset[str]
    """Arguments of the model's forward."""
    rows: tuple[int, ...]
    routes: tuple[RowRoute, ...]
    routing: Routing
    """For one new token a row."""
    ids_NL: Tensor
    mask_NL: Tensor
    seen: int = 0
    """Tokens of a row, padding included, that the cache holds."""
    cache: Any = None
    logits_NV: Tensor

    @classmethod
    def start(
        cls,
        bank: AdapterBank,
        takes: frozenset[str],
        rows: list[int],
        prompts: Sequence[Sequence[int]],
        routes: list[RowRoute],
        pad_id: int,
    ) -> _Decoding:
        longest = max(len(p) for p in prompts)
        return cls(
            bank=bank,
            modules=tuple(bank.model.modules()),
            takes=takes,
            rows=tuple(rows),
            routes=tuple(routes),
            routing=row_routing(bank, routes, 1),
            ids_NL=torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=bank.device),
            mask_NL=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=bank.device),
            logits_NV=torch.empty(len(prompts), 0),
        )

    @property
    def can_shrink(self) -> bool:
        """Whether rows can be dropped; kinds of cache that can't keep ended rows to the end."""
        return self.cache is None or type(self.cache) is DynamicCache

    def append(self, tokens_N: Tensor) -> _Decoding:
        """A token more in each row."""
        new_N1 = tokens_N[:, None]
        return replace(
            self, ids_NL=torch.cat([self.ids_NL, new_N1], 1), mask_NL=torch.cat([self.mask_NL, torch.ones_like(new_N1)], 1)
        )

    def only(self, running: Collection[int]) -> _Decoding:
        """Drop the rows that have ended, if the cache can."""
        keep = [i for i, row in enumerate(self.rows) if row in running]
        if len(keep) == len(self.rows) or not self.can_shrink:
            return self
        index = torch.tensor(keep, device=self.mask_NL.device)
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        routes = tuple(self.routes[i] for i in keep)
        return replace(
            self,
            rows=tuple(self.rows[i] for i in keep),
            routes=routes,
            routing=row_routing(self.bank, routes, 1),
            ids_NL=self.ids_NL[index],
            mask_NL=self.mask_NL[index],
        )

    def predict(self) -> _Decoding:
        """Run the model on what its cache hasn't seen."""
        new_NL = self.ids_NL[:, self.seen :]
        inputs: dict[str, Any] = {"input_ids": new_NL, "attention_mask": self.mask_NL, "use_cache": False, **PLAIN_OUTPUTS}
        caches = "past_key_values" in self.takes
        if caches:
            inputs |= {"use_cache": True, "past_key_values": self.cache}
        if "position_ids" in self.takes:
            inputs["position_ids"] = (self.mask_NL.cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        inputs = {name: value for name, value in inputs.items() if name in self.takes}
        routing = self.routing if new_NL.shape[1] == 1 else row_routing(self.bank, self.routes, new_NL.shape[1])
        with torch.no_grad(), evaluation_mode(self.modules), self.bank.route(routing):
            out = self.bank.model(**inputs)
        cache = out["past_key_values"] if caches and "past_key_values" in out else None
        return replace(self, cache=cache, seen=0 if cache is None else self.ids_NL.shape[1], logits_NV=out["logits"][:, -1])
