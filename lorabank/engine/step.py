"""`forward_backward` and `optim_step`: two of the four verbs that every training loop here is made of.

No files, no progress bars. One forward and one backward serve every adapter in the batch; gradients are sums over tokens and
pile up in the leaves until `optim_step` divides them by the adapter's own token weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import DropoutState
from lorabank.config.checks import check_choice
from lorabank.engine.batch import Batch
from lorabank.engine.head import SplitHead, split_head
from lorabank.engine.losses import LOSSES, Loss, LossInputs, nll
from lorabank.engine.modes import evaluation_mode, step_mode
from lorabank.errors import RoutingError
from lorabank.kernels.loss import token_logprobs, weighted_nll
from lorabank.optim.slot_optimizer import SlotOptimizer, SlotStep


@dataclass(frozen=True, kw_only=True)
class SlotLoss:
    """One adapter's part of a pass."""

    loss_sum: float
    """Σ over its rows of the loss (for `nll`: nats)."""
    tokens: float
    """Σ of its token weights."""
    finite: bool
    row_losses: Mapping[int, float]
    """Row of the batch to its loss sum."""

    @property
    def mean(self) -> float:
        """Loss a token."""
        return self.loss_sum / max(self.tokens, 1e-12)


@dataclass
class Engine:
    """What the verbs keep between passes: the bank and the split of its model's head, found once."""

    bank: AdapterBank
    loss: str | Loss = "nll"
    gradient_checkpointing: bool = False
    base_dropout: bool = False
    """Keep the base's own dropout in training; joint training then no longer equals training alone."""
    split: SplitHead | None = field(init=False, default=None)
    _split_known: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_choice("loss", self.loss, LOSSES)

    @property
    def loss_function(self) -> Loss:
        """The loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def head(self) -> SplitHead | None:
        """The checked split of body and head, or None."""
        if not self._split_known:
            self.split, self._split_known = split_head(self.bank), True
        return self.split


def forward_backward(
    engine: Engine,
    batch: Batch,
    *,
    steps: Mapping[str, int] | None = None,
    reference_logprobs_NL: Tensor | None = None,
) -> dict[str, SlotLoss]:
    """One joint pass: adds Σ-gradients to the leaves of every adapter in the batch; returns each adapter's loss.

    `steps`: adapter to its optimizer step, which dropout is drawn from; None switches dropout off. `reference_logprobs_NL`:
    log-probabilities of the tokens under a reference, for losses that need them. Rows routed to BASE get no gradient.
    """
    bank = engine.bank
    names = _single_slots(batch)
    batch = batch.to(bank.device)
    dropout = None if steps is None else DropoutState(steps=dict(steps), examples=batch.examples_N)
    routing = bank.routing(list(batch.routes), dropout=dropout)
    with step_mode(bank, gradient_checkpointing=engine.gradient_checkpointing, base_dropout=engine.base_dropout), bank.route(routing):
        total, row_losses = _row_losses(engine, batch, reference_logprobs_NL)
        if total.requires_grad:
            total.backward()
    return _by_slot(names, row_losses, batch)


def optim_step(
    optimizer: SlotOptimizer, learning_rates: Mapping[str, float], tokens: Mapping[str, float]
) -> dict[str, SlotStep]:
    """One optimizer step of the named adapters; every other adapter and its state stay byte-identical.

    `tokens`: each adapter's token weights since its last step. An adapter with a gradient that isn't finite is left unstepped.
    """
    return optimizer.step(learning_rates, tokens)


def logprobs(engine: Engine, batch: Batch) -> Tensor:
    """log p of every token with weight > 0, fp32 (N, L), zero elsewhere; no gradient, for evaluation and references."""
    batch = batch.to(engine.bank.device)
    out = torch.zeros_like(batch.weights_NL)
    with torch.no_grad(), evaluation_mode(engine.bank.model), engine.bank.route(list(batch.routes)):
        rows, columns = _trained(batch)
        out[rows, columns] = _token_logprobs(engine, batch, rows, columns)
    return out


def _single_slots(batch: Batch) -> list[str | None]:
    names: list[str | None] = []
    for route in batch.routes:
        if isinstance(route, Mapping):
            raise RoutingError(f"joint training takes one adapter a row, got the mixture {dict(route)!r}. Mixtures are for inference.")
        names.append(route if isinstance(route, str) else None)
    return names


def _trained(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns of the target tokens, in order."""
    where = batch.weights_NL.nonzero()
    return where[:, 0], where[:, 1]


def _row_losses(engine: Engine, batch: Batch, reference_NL: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the sum to differentiate, each row's loss (N,))."""
    rows, columns = _trained(batch)
    weights = batch.weights_NL[rows, columns]
    split = engine.head()
    if split is not None and engine.loss_function is nll:
        hidden = split.hidden(batch.input_ids_NL, batch.attention_mask_NL)[rows, columns - 1]
        targets = batch.input_ids_NL[rows, columns]
        total, logprobs_T = weighted_nll(hidden, split.head.weight, targets, weights, split.head.bias)
        return total, LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=rows, rows=batch.rows).per_row(-weights * logprobs_T)
    logprobs_T = _token_logprobs(engine, batch, rows, columns)
    if batch.references is not None:
        reference_NL = _base_references(batch, logprobs_T.detach(), rows, columns)
        weights = torch.where(torch.tensor([r is not None for r in batch.references], device=rows.device)[rows], weights, 0.0)
    reference = None if reference_NL is None else reference_NL.to(logprobs_T.device)[rows, columns]
    inputs = LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=rows, rows=batch.rows, reference_logprobs_T=reference)
    row_losses = engine.loss_function(inputs)
    return row_losses.sum(), row_losses.detach()


def _base_references(batch: Batch, logprobs_T: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each row's reference log-probabilities (N, L), read off its BASE copy in the batch."""
    known = torch.zeros_like(batch.weights_NL)
    known[rows, columns] = logprobs_T
    own = [i if r is None else r for i, r in enumerate(batch.references or ())]
    return known[torch.tensor(own, device=known.device)]


def _token_logprobs(engine: Engine, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
    targets = batch.input_ids_NL[rows, columns]
    split = engine.head()
    if split is not None:
        hidden = split.hidden(batch.input_ids_NL, batch.attention_mask_NL)[rows, columns - 1]
        return token_logprobs(hidden, split.head.weight, targets, split.head.bias)
    logits = engine.bank.model(input_ids=batch.input_ids_NL, attention_mask=batch.attention_mask_NL).logits
    return logits[rows, columns - 1].float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _by_slot(names: list[str | None], row_losses: Tensor, batch: Batch) -> dict[str, SlotLoss]:
    losses = row_losses.tolist()
    weights = batch.weights_NL.sum(1).tolist()
    found: dict[str, SlotLoss] = {}
    for name in dict.fromkeys(n for n in names if n is not None):
        mine = [i for i, n in enumerate(names) if n == name]
        loss_sum = sum(losses[i] for i in mine)
        found[name] = SlotLoss(
            loss_sum=loss_sum,
            tokens=sum(weights[i] for i in mine),
            finite=loss_sum == loss_sum and abs(loss_sum) != float("inf"),
            row_losses={i: losses[i] for i in mine},
        )
    return found
