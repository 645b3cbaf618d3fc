"""Passes over a `ModelBatch`: forward and backward (`TrainingPass` underneath, so captured on a GPU), and forward alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorabank.bank.routing import DropoutState, RowRoute
from lorabank.engine.engine import Engine
from lorabank.engine.gradients import copied, put_back
from lorabank.engine.model_batch import ModelBatch, RowLoss, Tensors
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.own_pass import Route, TrainingPass
from lorabank.engine.parts import Rows, whole
from lorabank.engine.results import SlotLoss, by_slot
from lorabank.engine.rows import single_slots
from lorabank.errors import ConfigError

_INPUT, _TARGET, _SCALE = "input.", "target.", "scale"
"""How the tensors of a batch are called in the one mapping that a `TrainingPass` takes."""


def model_forward_backward(engine: Engine, batch: ModelBatch, *, steps: Mapping[str, int] | None) -> dict[str, SlotLoss]:
    """One joint pass; see `forward_backward`. `steps`: adapter to its optimizer step, which LoRA's dropout is drawn from."""
    if engine.activation_offloading:
        raise ConfigError(
            "activation_offloading: only passes over tokens have it. Use gradient_checkpointing, or smaller batches with "
            "gradient_accumulation."
        )
    names = single_slots(batch.routes)
    before: list[tuple[nn.Parameter, Tensor | None]] = []

    def compute(part: ModelBatch, rows: Rows) -> Tensor:
        if part is not batch and not before:  # a later part may turn out not to fit at all
            before.extend(copied([leaf for mine in engine.leaves(filter(None, dict.fromkeys(names))).values() for leaf in mine]))
        mine = [names[row] for row in rows]
        if not engine.one_route:
            return _one_pass(engine, part, mine, steps)
        kept = copied([leaf for own in engine.leaves(filter(None, dict.fromkeys(mine))).values() for leaf in own])
        try:
            return _by_route(engine, part, lambda some, chosen: _one_pass(engine, some, [mine[i] for i in chosen], steps))
        except BaseException:  # of several passes some may have been made
            put_back(kept)
            raise

    try:
        parts = engine.fits.in_parts(batch, compute, engine.release)
    except BaseException:
        put_back(before)
        raise
    return by_slot(names, whole(parts, batch.rows), batch.example_weights())


def infer(engine: Engine, batch: ModelBatch, compute: RowLoss) -> Tensor:
    """What `compute` (model, inputs, targets) gives, a tensor whose dimension 0 is the rows, in as few passes as memory allows.

    Without gradients, in evaluation mode, each row under its route. Parts of a batch must give equal shapes but for the rows.
    """
    model = engine.bank.model

    def one(part: ModelBatch, rows: Rows) -> Tensor:
        part = part.to(engine.bank.device)
        route = part.routes[0] if engine.one_route else list(part.routes)
        with torch.no_grad(), evaluation_mode(model.modules()), engine.bank.route(route):
            return compute(model, part.inputs, part.targets)

    def all_of(part: ModelBatch, rows: Rows) -> Tensor:
        return _by_route(engine, part, one)

    return whole(engine.fits.in_parts(batch, all_of, engine.release), batch.rows)


def row_losses(engine: Engine, batch: ModelBatch) -> Tensor:
    """The batch's own loss of each row (N,), without gradients."""
    return infer(engine, batch, batch.loss)


def _by_route(engine: Engine, batch: ModelBatch, compute: Callable[[ModelBatch, Rows], Tensor]) -> Tensor:
    """`compute` (rows, their places) over the batch: at once, or with `one_route` over the rows of each route by themselves."""
    distinct: list[RowRoute] = []
    for route in batch.routes if engine.one_route else ():
        if route not in distinct:
            distinct.append(route)
    if len(distinct) < 2:
        return compute(batch, list(range(batch.rows)))
    places = [[i for i, own in enumerate(batch.routes) if own == route] for route in distinct]
    return whole([(mine, compute(batch.select(mine), mine)) for mine in places], batch.rows)


def _one_pass(engine: Engine, batch: ModelBatch, names: Sequence[str | None], steps: Mapping[str, int] | None) -> Tensor:
    bank = engine.bank
    tensors = {_INPUT + name: tensor for name, tensor in batch.inputs.items()}
    tensors |= {_TARGET + name: tensor for name, tensor in batch.targets.items()}
    scales = None
    if engine.scales_losses:
        scales = torch.tensor([1.0 if name is None else engine.loss_scales[name].value for name in names])
        tensors[_SCALE] = scales
    with engine.watched():
        losses = _training_pass(engine, batch.loss)(tensors, _route(engine, batch, names, steps))
    return losses if scales is None else losses / scales.to(bank.device)


def _route(engine: Engine, batch: ModelBatch, names: Sequence[str | None], steps: Mapping[str, int] | None) -> Route:
    bank = engine.bank
    used = [name for name in dict.fromkeys(names) if name is not None]
    dropout = [name for name in used if bank.config(name).dropout]
    if engine.one_route and steps is not None and dropout:
        raise ConfigError(
            f"adapter {dropout[0]!r}: dropout is drawn row by row, and a layer of {type(bank.model).__name__} has one input for "
            "all rows. Set dropout to 0."
        )
    if steps is None or not dropout:
        return batch.routes[0] if engine.one_route else list(batch.routes)
    missing = [name for name in used if name not in steps]
    if missing:
        raise ConfigError(f"forward_backward: steps has no entry for adapter {missing[0]!r}, whose dropout is drawn from it")
    state = DropoutState(steps=dict(steps), examples=batch.examples_E.to(bank.device))
    return bank.routing(list(batch.routes), dropout=state, exact=False)


def _training_pass(engine: Engine, loss: RowLoss) -> TrainingPass:
    """Kept by the loss: what is captured belongs to it."""
    key = (loss, engine.gradient_checkpointing, engine.base_dropout)
    if key not in engine.model_passes:
        engine.model_passes[key] = TrainingPass(
            engine.bank,
            _flat(loss, engine.bank.model),
            gradient_checkpointing=engine.gradient_checkpointing,
            base_dropout=engine.base_dropout,
            cuda_graphs=engine.cuda_graphs,
            masks=engine.masks,
            after_backward=_divider(engine) if engine.scales_losses else None,
        )
    return engine.model_passes[key]


def _flat(loss: RowLoss, model: nn.Module) -> Callable[[Tensors], Tensor]:
    """The loss over one mapping of all tensors."""

    def loss_of(tensors: Tensors) -> Tensor:
        inputs = {name[len(_INPUT) :]: tensor for name, tensor in tensors.items() if name.startswith(_INPUT)}
        targets = {name[len(_TARGET) :]: tensor for name, tensor in tensors.items() if name.startswith(_TARGET)}
        losses = loss(model, inputs, targets)
        rows = next(iter(tensors.values())).shape[0]
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"loss: expected one sum a row, a tensor of shape ({rows},), got {got}.")
        return losses * tensors[_SCALE] if _SCALE in tensors else losses

    return loss_of


def _divider(engine: Engine) -> Callable[[Sequence[nn.Parameter]], None]:
    """Takes the loss scales out of fresh gradients, adapter by adapter."""

    def divide(leaves: Sequence[nn.Parameter]) -> None:
        fresh = {id(leaf) for leaf in leaves}
        own = {name: engine.bank.parameters(name) for name in engine.bank.names}
        mine = {name: [leaf for leaf in parameters if id(leaf) in fresh] for name, parameters in own.items()}
        engine.loss_scales.divide({name: found for name, found in mine.items() if found})

    return divide
