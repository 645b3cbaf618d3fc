"""`forward_backward` and `optim_step`: two of the four verbs that every training loop here is made of.

No files, no progress bars. One forward and one backward serve every adapter in the batch; gradients are sums over tokens and
pile up in the leaves until `optim_step` divides them by the adapter's own token weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.routing import Routing
from lorabank.engine.batch import Batch, send
from lorabank.engine.compiled import fused_blocks
from lorabank.engine.compiling import give_up
from lorabank.engine.engine import Engine as Engine
from lorabank.engine.gradients import copied, fresh_gradients, put_back
from lorabank.engine.head import SplitHead, check_decoder, check_vocabulary, logits_of, longest_row
from lorabank.engine.losses import LossInputs, nll
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import model_forward_backward
from lorabank.engine.modes import evaluation_mode, step_mode
from lorabank.engine.offload import Offload
from lorabank.engine.packing import packed_tensors
from lorabank.engine.parts import Compute, Rows, whole
from lorabank.engine.replaying import comes_again, granule, is_small, replayed, uncaptured
from lorabank.engine.results import SlotLoss, by_slot
from lorabank.engine.rows import dropout_routing, row_routing, single_slots
from lorabank.errors import ConfigError, DataError
from lorabank.kernels.loss import token_logprobs, weighted_nll
from lorabank.notices import warn_once
from lorabank.optim.slot_optimizer import SlotOptimizer, SlotStep


def forward_backward(
    engine: Engine,
    batch: Batch | ModelBatch,
    *,
    steps: Mapping[str, int] | None = None,
    reference_logprobs_NL: Tensor | None = None,
) -> dict[str, SlotLoss]:
    """One joint pass: adds Σ-gradients to the leaves of every adapter in the batch; returns each adapter's loss.

    `steps`: adapter to its optimizer step, which dropout is drawn from; None switches dropout off. `reference_logprobs_NL`:
    log-probabilities of the tokens under a reference, for losses that need them. Rows routed to BASE get no gradient. A
    `ModelBatch` has its own loss.
    Raises RoutingError, DataError, ConfigError or TooLargeError; gradients are then as they were.
    """
    if isinstance(batch, ModelBatch):
        if reference_logprobs_NL is not None:
            raise ConfigError("reference_logprobs_NL: only batches of tokens have it. Put references into the batch's targets.")
        return model_forward_backward(engine, batch, steps=steps)
    names = single_slots(batch.routes)
    _check_batch(engine.bank.model, batch, reference_logprobs_NL)

    before: list[tuple[nn.Parameter, Tensor | None]] = []

    def compute(part: Batch, rows: Rows) -> Tensor:
        if part is not batch and not before:  # a later part may turn out not to fit at all
            before.extend(copied([leaf for mine in engine.leaves(filter(None, dict.fromkeys(names))).values() for leaf in mine]))
        reference = reference_logprobs_NL
        if reference is not None and part is not batch:
            reference = reference[list(rows), : part.input_ids_NL.shape[1]]
        return _one_pass(engine, part, [names[row] for row in rows], steps, reference)

    try:
        parts = engine.fits.in_parts(batch, _or_uncompiled(engine, compute), engine.release)
    except BaseException:
        put_back(before)
        raise
    losses_E = whole([(batch.examples_of(rows), losses) for rows, losses in parts], len(batch.examples_E))
    return by_slot(single_slots(batch.example_routes), losses_E, batch.example_weights())


def _or_uncompiled(engine: Engine, compute: Compute[Batch]) -> Compute[Batch]:
    """`compute`, again without the kernels that don't run on this GPU: a failed try changes nothing."""

    def tried(part: Batch, rows: Rows) -> Tensor:
        while True:
            try:
                return compute(part, rows)
            except Exception as error:
                if not give_up(engine.bank.model, error):  # nothing is left to be given up in the end
                    raise
                engine.uncompiled = True
                engine.graphs.forget()  # of blocks that are no more

    return tried


def _one_pass(
    engine: Engine, batch: Batch, names: list[str | None], steps: Mapping[str, int] | None, reference_NL: Tensor | None
) -> Tensor:
    trained = _trained(batch)
    if engine.cuda_graphs and comes_again(engine, batch, reference_NL):
        batch = batch.lengthened(granule(batch), longest_row(engine.bank.model))
    batch = batch.to(engine.bank.device)
    routing = _routing(engine, batch, names, steps)
    if _graphed(engine, batch, routing, reference_NL):
        return replayed(engine, batch, trained, routing, _passed)
    return _passed(engine, batch, trained, routing, reference_NL)


def _passed(
    engine: Engine,
    batch: Batch,
    trained: Sequence[Tensor],
    routing: Routing,
    reference_NL: Tensor | None,
    offload: Offload | None = None,
) -> Tensor:
    """Forward and backward; each example's loss (E,). Leaves' gradients are as before where it raises.

    `offload`: where block inputs go with activation_offloading; None: the engine's own.
    """
    bank = engine.bank
    leaves = engine.leaves(sorted(routing.names))
    mode = step_mode(
        bank,
        gradient_checkpointing=engine.gradient_checkpointing,
        base_dropout=engine.base_dropout,
        offload=(offload or engine.offload) if engine.activation_offloading else None,
    )
    attention = engine.attention(batch)
    fresh = fresh_gradients([leaf for mine in leaves.values() for leaf in mine])
    with mode, attention, bank.route(routing), torch.enable_grad(), fresh:
        with engine.watched():
            total, row_losses = _row_losses(engine, batch, trained, reference_NL)
        if total.requires_grad:
            total.backward()
            if engine.scales_losses:
                engine.loss_scales.divide(leaves)
    return row_losses


def _graphed(engine: Engine, batch: Batch, routing: Routing, reference_NL: Tensor | None) -> bool:
    """Whether this pass can be one of those that are captured: all of it runs on one GPU, without a look at what is on it."""
    if not engine.cuda_graphs or engine.bank.device.type != "cuda" or engine.base_dropout:
        return False
    if torch.is_autocast_enabled(engine.bank.device.type):  # blocks run as they are there
        return False
    why = uncaptured(engine, batch, reference_NL)
    if why is not None:
        if is_small(batch) and not engine.uncompiled and fused_blocks(engine.bank, whole=False):
            warn_once(f"passes {why} aren't captured as CUDA graphs, so small ones wait for the host.")
        return False
    return (is_small(batch) or not batch.packed) and engine.deterministic and engine.all_fused(routing)


def optim_step(optimizer: SlotOptimizer, learning_rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
    """One optimizer step of the named adapters; every other adapter and its state stay byte-identical.

    `tokens`: each adapter's token weights since its last step. An adapter with a gradient that isn't finite is left unstepped.
    """
    return optimizer.step(learning_rates, tokens)


def logprobs(engine: Engine, batch: Batch) -> Tensor:
    """log p of every token with weight ≠ 0, fp32 (N, L), zero elsewhere; no gradient, for evaluation and references."""
    _check_batch(engine.bank.model, batch, None)
    out = torch.zeros_like(batch.weights_NL, device=engine.bank.device)

    def compute(part: Batch, rows: Rows) -> Tensor:
        found = _logprobs(engine, part)
        out[list(rows), : found.shape[1]] = found
        return found[:, 0]

    engine.fits.in_parts(batch, _or_uncompiled(engine, compute), engine.release)
    return out


def _logprobs(engine: Engine, batch: Batch) -> Tensor:
    rows, columns, _ = _trained(batch)
    batch = batch.to(engine.bank.device)
    rows, columns = send(rows, engine.bank.device), send(columns, engine.bank.device)
    out = torch.zeros_like(batch.weights_NL)
    routing = row_routing(engine.bank, batch.routes, batch.input_ids_NL.shape[1], exact=False)
    model = engine.bank.model
    with (
        torch.no_grad(),
        evaluation_mode(model.modules()),
        engine.attention(batch),
        engine.bank.route(routing),
    ):
        out[rows, columns] = _token_logprobs(engine, batch, rows, columns)
    return out


def _routing(engine: Engine, batch: Batch, names: list[str | None], steps: Mapping[str, int] | None) -> Routing:
    bank, length = engine.bank, batch.input_ids_NL.shape[1]
    used = [name for name in dict.fromkeys(names) if name is not None]
    if steps is None or not any(bank.config(name).dropout for name in used):
        return engine.routing(batch.routes, length)
    missing = [name for name in used if name not in steps]
    if missing:
        raise ConfigError(f"forward_backward: steps has no entry for adapter {missing[0]!r}, whose dropout is drawn from it")
    examples, places_NL = batch.examples_E, None
    if batch.packed:  # a token draws as its example in a row of its own would
        examples, places_NL = examples[batch.example_numbers_NL()], packed_tensors(batch, examples.device).positions_NL
    return dropout_routing(bank, batch.routes, length, steps, examples, places_NL=places_NL, folded=engine.folded())


def _check_batch(model: nn.Module, batch: Batch, reference_NL: Tensor | None) -> None:
    check_decoder(model)
    if reference_NL is not None and (batch.references is not None or reference_NL.shape != batch.weights_NL.shape):
        raise DataError(
            f"reference_logprobs_NL: expected {tuple(batch.weights_NL.shape)} for a batch without references of its own, "
            f"got {tuple(reference_NL.shape)}{' and a batch with references' if batch.references is not None else ''}"
        )
    check_vocabulary(model, int(batch.input_ids_NL.max()))


def _trained(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and examples of the target tokens, in order. For a batch still on the host: a GPU would be waited for."""
    rows, columns = batch.weights_NL.nonzero().unbind(1)
    return rows, columns, batch.example_numbers_NL()[rows, columns] if batch.packed else rows


def _row_losses(engine: Engine, batch: Batch, trained: Sequence[Tensor], reference_NL: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the sum to differentiate, each example's loss (E,))."""
    rows, columns, examples = (send(index, engine.bank.device) for index in trained)
    count = len(batch.examples_E)
    weights = batch.weights_NL[rows, columns]
    scale_E = _loss_scales(engine, batch)
    split = engine.head()
    if split is not None and engine.loss_function is nll:
        # one index a token, so that a GPU copies whole rows; token 0, which indices are filled up with, is predicted by none
        places = (rows * batch.input_ids_NL.shape[1] + columns - 1).clamp(min=0)
        hidden = _hidden(engine, split, batch).flatten(0, 1).index_select(0, places)
        targets = batch.input_ids_NL[rows, columns]
        scaled = weights if scale_E is None else weights * scale_E[examples]
        total, logprobs_T = weighted_nll(hidden, split.head.weight, targets, scaled, split.head.bias, shape=split.shape)
        return total, nll(LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=examples, rows=count))
    logprobs_T = _token_logprobs(engine, batch, rows, columns)
    if batch.references is not None:
        reference_NL = _base_references(batch, logprobs_T.detach(), rows, columns)
        serving = torch.tensor([row in batch.references for row in range(batch.rows)], device=rows.device)
        weights = weights.masked_fill(serving[rows], 0.0)  # a row that is another's reference isn't trained on
    reference = None if reference_NL is None else reference_NL.to(logprobs_T.device)[rows, columns]
    inputs = LossInputs(logprobs_T=logprobs_T, weights_T=weights, rows_T=examples, rows=count, reference_logprobs_T=reference)
    row_losses = engine.loss_function(inputs)
    if not isinstance(row_losses, Tensor) or row_losses.shape != (count,):
        got = tuple(row_losses.shape) if isinstance(row_losses, Tensor) else type(row_losses).__name__
        raise ConfigError(f"loss: expected one sum a row, a tensor of shape ({count},), got {got}. inputs.per_row(...) makes it.")
    return (row_losses if scale_E is None else row_losses * scale_E).sum(), row_losses.detach()


def _loss_scales(engine: Engine, batch: Batch) -> Tensor | None:
    """What each example's loss is multiplied by for backward (E,); None for a base that needs none."""
    if not engine.scales_losses:
        return None
    factors = [engine.loss_scales[route].value if isinstance(route, str) else 1.0 for route in batch.example_routes]
    return send(torch.tensor(factors), engine.bank.device)


def _hidden(engine: Engine, split: SplitHead, batch: Batch) -> Tensor:
    """The body's last hidden states (N, L, H)."""
    if not batch.packed:
        return split.hidden(batch.input_ids_NL, None if engine.maskless(batch.input_ids_NL.shape[1]) else batch.mask)
    return split.hidden(batch.input_ids_NL, **_packed_arguments(engine, batch))


def _packed_arguments(engine: Engine, batch: Batch) -> dict[str, Any]:
    return engine.packing(batch.input_ids_NL.shape[1]).arguments(batch)


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
        # one index a token, so that a GPU copies whole rows; token 0, which indices are filled up with, is predicted by none
        places = (rows * batch.input_ids_NL.shape[1] + columns - 1).clamp(min=0)
        hidden = _hidden(engine, split, batch).flatten(0, 1).index_select(0, places)
        return token_logprobs(hidden, split.head.weight, targets, split.head.bias, shape=split.shape)
    arguments = _packed_arguments(engine, batch) if batch.packed else {"attention_mask": batch.attention_mask_NL}
    logits = logits_of(engine.bank.model, batch.input_ids_NL, **arguments)
    return logits[rows, columns - 1].float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
