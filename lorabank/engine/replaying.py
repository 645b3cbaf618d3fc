"""An engine's pass as a CUDA graph: what it reads of its batch, what it depends on besides, and shapes that come again.

Rows, trained tokens and, where rows are packed, examples are filled up to one of few numbers, so that a graph that was captured
for one batch serves the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from lorabank.bank.routing import Routing
from lorabank.engine.batch import Batch, PackedTensors, send
from lorabank.engine.engine import Engine
from lorabank.engine.head import end_addresses
from lorabank.engine.losses import nll
from lorabank.engine.packing import packed_tensors
from lorabank.engine.parts import capturing
from lorabank.kernels.tables import DropTables, RouteTables

LENGTH_GRANULE = 64
"""Rows are padded to a multiple of so many tokens where passes are captured, so that shapes come again."""
PACKED_GRANULE = 128
"""The same for packed rows, most of which are nearly as long as they may be; less for rows that are short."""
EXAMPLE_GRANULE = 16
"""Examples of a captured pass over packed rows are filled up to a multiple of this."""
TRAINED_GRANULE = 256
"""Trained tokens of a captured pass are filled up to a multiple of this."""
SMALL = 4096
"""Tokens of a pass up to which a large GPU may be done before the host has started its kernels.

Larger ones over packed rows gain next to nothing by a graph, and their shapes are many.
"""
Passed = Callable[..., Tensor]
"""(engine, batch, rows, columns and examples of its trained tokens, routing, no references, offload) → losses (E,)."""


def uncaptured(engine: Engine, batch: Batch, reference_NL: Tensor | None) -> str | None:
    """What keeps passes like this one from being captured on any GPU, if something does."""
    if engine.scales_losses:
        return "over a base in fp16"
    if engine.loss_function is not nll or reference_NL is not None or batch.references is not None:
        return "with another loss than nll"
    if engine.head() is None:
        return f"of {type(engine.bank.model).__name__}, whose loss isn't computed in chunks,"
    return None


def comes_again(engine: Engine, batch: Batch, reference_NL: Tensor | None) -> bool:
    """Whether rows are worth filling up to one of few lengths: on a GPU, where padding needs no mask."""
    if engine.fits.times and batch.rows == 1:  # it may be one that just fits
        return False
    if not batch.packed:
        return engine.maskless(batch.input_ids_NL.shape[1])
    captures = bool(engine.blocks) and not engine.base_dropout and engine.graphs.refused is None
    return captures and is_small(batch) and uncaptured(engine, batch, reference_NL) is None


def is_small(batch: Batch) -> bool:
    """Whether a pass over the batch may wait for the host."""
    return batch.input_ids_NL.numel() <= SMALL


def granule(batch: Batch) -> int:
    """What the length of a batch's rows is filled up to a multiple of: packed ones by a sixteenth, or seven tokens, at most."""
    if not batch.packed:
        return LENGTH_GRANULE
    return min(PACKED_GRANULE, 1 << max(3, (batch.input_ids_NL.shape[1] // 16).bit_length() - 1))


def replayed(engine: Engine, batch: Batch, trained: Sequence[Tensor], routing: Routing, passed: Passed) -> Tensor:
    """The same as `passed`, from a graph where one was captured. `trained`: rows, columns, examples of its trained tokens."""
    bank = engine.bank
    (units, length), slots, device = batch.input_ids_NL.shape, bank.table_slots, bank.device
    if routing.per == "token":
        units, length = units * length, 1
    tables = routing.tables(units, length, bank.slot_numbers, slots, device)
    if tables is None:
        return passed(engine, batch, trained, routing, None)
    drops = routing.drops(units, length, bank.slot_numbers, slots, device)
    inputs, examples = _inputs(engine, batch, trained), len(batch.examples_E)
    inputs |= {f"tables {i}": table for i, table in enumerate(tables.tensors)}
    if drops is not None:
        inputs |= {f"drops {i}": table for i, table in enumerate(drops.tensors)}
    if batch.packed:
        batch = replace(batch, examples_E=pad(batch.examples_E, (0, _examples(batch) - examples)))
    holds: list[object] = []
    if engine.activation_offloading:
        engine.offload.start()  # ends the pass before, which a capture can't

    def compute(tensors: Sequence[Tensor]) -> Tensor:
        given = dict(zip(inputs, tensors, strict=True))
        full, places = _from_inputs(batch, given)
        if not capturing():  # a block may turn out not to compile, and its plain layers read all of the route
            row_losses = passed(engine, full, places, routing, None)
            if engine.activation_offloading:
                engine.offload.remember((key, full.input_ids_NL.shape))
            return row_losses
        dropped = None if drops is None else DropTables(*_named("drops", given))
        captured = routing.captured(units, length, slots, device, RouteTables(*_named("tables", given)), dropped)
        if not engine.activation_offloading:
            return passed(engine, full, places, captured, None)
        offload = engine.offload.for_capture((key, full.input_ids_NL.shape))
        try:
            row_losses = passed(engine, full, places, captured, None, offload)
        finally:
            offload.end_capture()  # or the capture can't end, however it went
        holds.append(offload)
        return row_losses

    own = [leaf for _, mine in sorted(engine.leaves(routing.names).items()) for leaf in mine]
    key = *_depends_on(engine, routing, own), tuple(inputs), len(batch.examples_E)
    tensors = list(inputs.values())

    def leaves() -> Sequence[nn.Parameter]:
        return own

    if not engine.activation_offloading:
        return engine.graphs.run(key, tensors, leaves, compute)[:examples]
    kept = key, batch.input_ids_NL.shape
    return engine.graphs.run(key, tensors, leaves, compute, holds, lambda: engine.offload.reserve(kept))[:examples]


def _depends_on(engine: Engine, routing: Routing, leaves: Sequence[nn.Parameter]) -> tuple[Any, ...]:
    """What a graph holds on to beside its batch: the addresses that it was captured with, the tables of these very blocks."""
    bank = engine.bank
    blocks, trains = tuple((block, block.addresses) for block in engine.blocks), bytes([leaf.requires_grad for leaf in leaves])
    how = engine.gradient_checkpointing, engine.activation_offloading
    return bank.structure, blocks, end_addresses(bank.model), routing.names, trains, how


def _inputs(engine: Engine, batch: Batch, trained: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a replay reads of a batch, on the device."""
    device = engine.bank.device
    rows, columns = (send(_lengthened(index), device) for index in trained[:2])
    inputs = {"ids": batch.input_ids_NL, "weights": batch.weights_NL, "rows": rows, "columns": columns}
    if batch.packed:
        packed = packed_tensors(batch, device, spans=_examples(batch) + batch.rows)  # padding is a span of its own
        examples = send(_lengthened(trained[2]), device)
        return inputs | {"examples": examples, "ends": packed.cu_S, "positions": packed.positions_NL}
    mask = None if engine.maskless(batch.input_ids_NL.shape[1]) else batch.mask
    return inputs if mask is None else inputs | {"mask": mask}


def _from_inputs(batch: Batch, given: Mapping[str, Tensor]) -> tuple[Batch, tuple[Tensor, Tensor, Tensor]]:
    """(the batch made of them, rows, columns and examples of its trained tokens)."""
    full = replace(
        batch,
        input_ids_NL=given["ids"],
        weights_NL=given["weights"],
        attention_mask_NL=given.get("mask", batch.attention_mask_NL),
        boundaries=PackedTensors(given["ends"], given["positions"]) if batch.packed else None,
    )
    return full, (given["rows"], given["columns"], given.get("examples", given["rows"]))


def _named(prefix: str, given: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in given.items() if name.startswith(prefix)]


def _examples(batch: Batch) -> int:
    """Examples of a packed batch, filled up."""
    return -(-len(batch.examples_E) // EXAMPLE_GRANULE) * EXAMPLE_GRANULE


def _lengthened(index_T: Tensor) -> Tensor:
    """Filled up to one of few lengths with token 0 of row 0, which never has a weight."""
    return pad(index_T, (0, -len(index_T) % TRAINED_GRANULE))
