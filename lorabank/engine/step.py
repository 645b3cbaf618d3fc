"""`forward_backward` and `optim_step`: two of the four verbs that every training loop here is made of.

No files, no progress bars. One forward and one backward serve every adapter in the batch; gradients are sums over tokens and
pile up in the leaves until `optim_step` divides them by the adapter's own token weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import Routing
from lorabank.config.checks import check_choice
from lorabank.engine.attention import own_attention
from lorabank.engine.batch import Batch, send
from lorabank.engine.fused_block import FusedBlock, fused_blocks, slot_count, takes_tables
from lorabank.engine.graphs import PassGraphs
from lorabank.engine.head import (
    SplitHead,
    check_decoder,
    check_vocabulary,
    logits_of,
    output_head,
    split_head,
    works_without_masks,
)
from lorabank.engine.losses import LOSSES, Loss, LossInputs, nll
from lorabank.engine.modes import evaluation_mode, no_random_draws, step_mode
from lorabank.engine.results import SlotLoss, by_slot
from lorabank.engine.rows import dropout_routing, folds_tokens, row_routing
from lorabank.errors import ConfigError, DataError, RoutingError
from lorabank.kernels.loss import token_logprobs, weighted_nll
from lorabank.kernels.tables import DropTables, RouteTables
from lorabank.optim.slot_optimizer import SlotOptimizer, SlotStep

TRAINED_GRANULE = 256
"""Trained tokens of a captured pass are filled up to a multiple of this."""


@dataclass
class Engine:
    """What the verbs keep between passes: the bank, and what was found out about its model."""

    bank: AdapterBank
    loss: str | Loss = "nll"
    """A name in `LOSSES`, or a function of your own."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward: less memory, about a third more time."""
    base_dropout: bool = False
    """Keep the base's own dropout in training; joint training then no longer equals training alone."""
    cuda_graphs: bool = True
    """Capture passes of a shape that comes again, where the model's blocks are compiled for a GPU: small steps need it."""
    graphs: PassGraphs = field(init=False, default_factory=PassGraphs, repr=False)
    _split: SplitHead | None = field(init=False, default=None, repr=False)
    _probed_head: nn.Module | None = field(init=False, default=None, repr=False)
    _probed: bool = field(init=False, default=False, repr=False)
    _folded: tuple[int, bool] | None = field(init=False, default=None, repr=False)
    """The bank's structure count, and whether the model folds rows and tokens."""
    _fused: tuple[int, Sequence[FusedBlock]] = field(init=False, default=(-1, ()), repr=False)
    """The bank's structure count, and its fused blocks if they hold all adapted layers."""
    _maskless: tuple[SplitHead | None, bool] | None = field(init=False, default=None, repr=False)
    _deterministic: set[bool] = field(init=False, default_factory=set, repr=False)
    """Values of `gradient_checkpointing` under which the base was seen to draw no random numbers."""

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_choice("loss", self.loss, LOSSES)
        check_decoder(self.bank.model)

    @property
    def loss_function(self) -> Loss:
        """The loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def head(self) -> SplitHead | None:
        """The checked split of body and head, or None; looked for again when the head was wrapped by an adapter since."""
        head = output_head(self.bank.model)
        if not self._probed or head is not self._probed_head:
            self._split, self._probed_head, self._probed = split_head(self.bank), head, True
        return self._split

    def folded(self) -> bool:
        """Whether the model folds rows and tokens into one dimension before an adapted layer."""
        if self._folded is None or self._folded[0] != self.bank.structure:
            self._folded = (self.bank.structure, folds_tokens(self.bank))
        return self._folded[1]

    def maskless(self) -> bool:
        """Whether passes do without attention masks: a causal model on a GPU, whose batches are padded on the right."""
        split = self.head()
        if self._maskless is None or self._maskless[0] is not split:
            self._maskless = (split, split is not None and works_without_masks(self.bank, split))
        return self._maskless[1]

    def all_fused(self, routing: Routing) -> bool:
        """Whether every adapted layer's product is compiled into a block of the model's, under this route."""
        structure, fused = self._fused
        if structure != self.bank.structure or not fused or not all(block.in_place for block in fused):
            self._fused = self.bank.structure, fused_blocks(self.bank)
        return bool(self._fused[1]) and takes_tables(routing)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around a forward pass: a check, until it has passed once, that the base draws no random numbers."""
        if self.base_dropout or self.gradient_checkpointing in self._deterministic:
            yield
            return
        with no_random_draws(self.bank.device, " (with gradient_checkpointing)" if self.gradient_checkpointing else ""):
            yield
        self._deterministic.add(self.gradient_checkpointing)


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
    Raises before any gradient changes: RoutingError, DataError or ConfigError.
    """
    bank = engine.bank
    names = _single_slots(batch)
    _check_batch(bank.model, batch, reference_logprobs_NL)
    weights = batch.weights_NL.sum(1).tolist()
    trained = _trained(batch)
    batch = batch.to(bank.device)
    routing = _routing(engine, batch, names, steps)
    if _graphed(engine, batch, routing, reference_logprobs_NL):
        row_losses = _replayed(engine, batch, trained, routing)
    else:
        row_losses = _passed(engine, batch, trained, routing, reference_logprobs_NL)
    return by_slot(names, row_losses, weights)


def _passed(
    engine: Engine, batch: Batch, trained: tuple[Tensor, Tensor], routing: Routing, reference_NL: Tensor | None
) -> Tensor:
    """Forward and backward; each row's loss (N,)."""
    bank = engine.bank
    mode = step_mode(bank, gradient_checkpointing=engine.gradient_checkpointing, base_dropout=engine.base_dropout)
    attention = own_attention(bank.model.modules(), bank.device, maskless=engine.maskless())
    with mode, attention, bank.route(routing), torch.enable_grad():
        with engine.watched():
            total, row_losses = _row_losses(engine, batch, trained, reference_NL)
        if total.requires_grad:
            total.backward()
    return row_losses


def _graphed(engine: Engine, batch: Batch, routing: Routing, reference_NL: Tensor | None) -> bool:
    """Whether this pass can be one of those that are captured: all of it runs on one GPU, without a look at what is on it."""
    if not engine.cuda_graphs or engine.bank.device.type != "cuda" or engine.base_dropout or engine.loss_function is not nll:
        return False
    plain = reference_NL is None and batch.references is None and engine.head() is not None
    return plain and engine.gradient_checkpointing in engine._deterministic and engine.all_fused(routing)


def _replayed(engine: Engine, batch: Batch, trained: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
    """The same as `_passed`, from a graph where one was captured."""
    bank = engine.bank
    rows, columns = (send(_lengthened(index), bank.device) for index in trained)
    (units, length), slots, device = batch.input_ids_NL.shape, slot_count(bank), bank.device
    if routing.per == "token":
        units, length = units * length, 1
    tables = routing.tables(units, length, bank.slot_numbers, slots, device)
    if tables is None:
        return _passed(engine, batch, (rows, columns), routing, None)
    drops = routing.drops(units, length, bank.slot_numbers, slots, device)
    mask = None if engine.maskless() else batch.mask
    tensors = [batch.input_ids_NL, batch.weights_NL, rows, columns, *tables.tensors, *([] if mask is None else [mask])]
    tensors += [] if drops is None else drops.tensors

    def compute(given: Sequence[Tensor]) -> Tensor:
        ids, weights, rows, columns, order, tiles, chunks, spans, *rest = given
        full = replace(
            batch, input_ids_NL=ids, weights_NL=weights, attention_mask_NL=batch.attention_mask_NL if mask is None else rest[0]
        )
        given_drops = None if drops is None else DropTables(*given[-2:])
        captured = routing.captured(units, length, slots, device, RouteTables(order, tiles, chunks, spans), given_drops)
        return _passed(engine, full, (rows, columns), captured, None)

    places = tuple(block.addresses for block in engine._fused[1])  # a graph holds on to the addresses that it was captured with
    key = (bank.structure, places, routing.names, engine.gradient_checkpointing, mask is None)
    return engine.graphs.run(key, tensors, lambda: [p for name in sorted(routing.names) for p in bank.parameters(name)], compute)


def _lengthened(index_T: Tensor) -> Tensor:
    """Filled up to one of few lengths with token 0 of row 0, which never has a weight."""
    return torch.nn.functional.pad(index_T, (0, -len(index_T) % TRAINED_GRANULE))


def optim_step(optimizer: SlotOptimizer, learning_rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
    """One optimizer step of the named adapters; every other adapter and its state stay byte-identical.

    `tokens`: each adapter's token weights since its last step. An adapter with a gradient that isn't finite is left unstepped.
    """
    return optimizer.step(learning_rates, tokens)


def logprobs(engine: Engine, batch: Batch) -> Tensor:
    """log p of every token with weight ≠ 0, fp32 (N, L), zero elsewhere; no gradient, for evaluation and references."""
    _check_batch(engine.bank.model, batch, None)
    rows, columns = _trained(batch)
    batch = batch.to(engine.bank.device)
    rows, columns = send(rows, engine.bank.device), send(columns, engine.bank.device)
    out = torch.zeros_like(batch.weights_NL)
    routing = row_routing(engine.bank, batch.routes, batch.input_ids_NL.shape[1], exact=False)
    model = engine.bank.model
    with (
        torch.no_grad(),
        evaluation_mode(model.modules()),
        own_attention(model.modules(), engine.bank.device, maskless=engine.maskless()),
        engine.bank.route(routing),
    ):
        out[rows, columns] = _token_logprobs(engine, batch, rows, columns)
    return out


def _single_slots(batch: Batch) -> list[str | None]:
    names: list[str | None] = []
    for route in batch.routes:
        if isinstance(route, Mapping):
            raise RoutingError(
                f"joint training takes one adapter a row, got the mixture {dict(route)!r}. Mixtures are for inference: give the "
                "row to one adapter, or call the model inside bank.route(...) in a loop of your own."
            )
        names.append(route if isinstance(route, str) else None)
    return names


def _routing(engine: Engine, batch: Batch, names: list[str | None], steps: Mapping[str, int] | None) -> Routing:
    bank, length = engine.bank, batch.input_ids_NL.shape[1]
    used = [name for name in dict.fromkeys(names) if name is not None]
    if steps is None or not any(bank.config(name).dropout for name in used):
        fold = length if bank.device.type != "cuda" or engine.folded() else 1  # a list of all tokens takes the host milliseconds
        return row_routing(bank, batch.routes, fold, exact=False)
    missing = [name for name in used if name not in steps]
    if missing:
        raise ConfigError(f"forward_backward: steps has no entry for adapter {missing[0]!r}, whose dropout is drawn from it")
    return dropout_routing(bank, batch.routes, length, steps, batch.examples_N, folded=engine.folded())


def _check_batch(model: nn.Module, batch: Batch, reference_NL: Tensor | None) -> None:
    if reference_NL is not None and (batch.references is not None or reference_NL.shape != batch.weights_NL.shape):
        raise DataError(
            f"reference_logprobs_NL: expected {tuple(batch.weights_NL.shape)} for a batch without references of its own, "
            f"got {tuple(reference_NL.shape)}{' and a batch with references' if batch.references is not None else ''}"
        )
    check_vocabulary(model, int(batch.input_ids_NL.max()))


def _trained(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns of the target tokens, in order. For a batch still on the host: on a GPU it would have to be waited for."""
    where = batch.weights_NL.nonzero()
    return where[:, 0], where[:, 1]


def _row_losses(
    engine: Engine, batch: Batch, trained: tuple[Tensor, Tensor], reference_NL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the sum to differentiate, each row's loss (N,))."""
    rows, columns = (send(index, engine.bank.device) for index in trained)
    weights = batch.weights_NL[rows, columns]
    split = engine.head()
    if split is not None and engine.loss_function is nll:
        hidden = split.hidden(batch.input_ids_NL, None if engine.maskless() else batch.mask)[rows, columns - 1]
        targets = batch.input_ids_NL[rows, columns]
        total, logprobs_T = weighted_nll(hidden, split.head.weight, targets, weights, split.head.bias)
        return total, nll(LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=rows, rows=batch.rows))
    logprobs_T = _token_logprobs(engine, batch, rows, columns)
    if batch.references is not None:
        reference_NL = _base_references(batch, logprobs_T.detach(), rows, columns)
        serving = torch.tensor([row in batch.references for row in range(batch.rows)], device=rows.device)
        weights = weights.masked_fill(serving[rows], 0.0)  # a row that is another's reference isn't trained on
    reference = None if reference_NL is None else reference_NL.to(logprobs_T.device)[rows, columns]
    inputs = LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=rows, rows=batch.rows, reference_logprobs_T=reference)
    row_losses = engine.loss_function(inputs)
    if not isinstance(row_losses, Tensor) or row_losses.shape != (batch.rows,):
        got = tuple(row_losses.shape) if isinstance(row_losses, Tensor) else type(row_losses).__name__
        raise ConfigError(
            f"loss: expected one sum a row, a tensor of shape ({batch.rows},), got {got}. inputs.per_row(...) makes it."
        )
    return row_losses.sum(), row_losses.detach()


def _base_references(batch: Batch, logprobs_T: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each row's reference log-probabilities (N, L), read off its BASE copy in the batch; its own where it has none."""
    known = torch.zeros_like(batch.weights_NL)
    known[rows, columns] = logprobs_T
    own = [i if r is None else r for i, r in enumerate(batch.references or ())]
    return known[torch.tensor(own, device=known.device)]


def _token_logprobs(engine: Engine, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
    targets = batch.input_ids_NL[rows, columns]
    split = engine.head()
    if split is not None:
        hidden = split.hidden(batch.input_ids_NL, None if engine.maskless() else batch.mask)[rows, columns - 1]
        return token_logprobs(hidden, split.head.weight, targets, split.head.bias)
    logits = logits_of(engine.bank.model, batch.input_ids_NL, batch.attention_mask_NL)
    return logits[rows, columns - 1].float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
