"""What of a bank's model is compiled into fused blocks, and what isn't."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.bank.bank import AdapterBank, all_layers, saved_modules
from lorabank.bank.extra.extras import BIAS, LORA_BIAS, ROWS
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import Routing
from lorabank.engine.fused_block import FusedBlock

_SETTINGS = {ROWS: "trainable_token_indices", BIAS: "bias (exclude=[...])", LORA_BIAS: "lora_bias"}
"""By what an adapter has in a place beside A and B."""


def fused_blocks(bank: AdapterBank, *, whole: bool = True) -> list[FusedBlock]:
    """The model's fused blocks; with `whole` none where an adapted layer's product isn't compiled into one of them."""
    return [] if whole and left_out(bank) else _found_blocks(bank)


def left_out(bank: AdapterBank) -> list[str]:
    """Adapted layers, by path, whose product isn't compiled into a fused block; none for a model without fused blocks.

    Nor are those among them that a captured pass can follow all the same.
    """
    found = _found_blocks(bank)
    compiled = [fused.block for fused in found if not fused.stays_plain]
    inside = {id(module) for block in compiled for module in block.modules() if isinstance(module, LoRALayer)}
    alone = [layer for layer in all_layers(bank) if not (layer.follows or (layer.fusable and id(layer) in inside))]
    return [*(layer.path for layer in alone), *saved_paths(bank)] if found else []


def named_by(bank: AdapterBank, paths: Sequence[str]) -> str:
    """The settings of adapters that mean these modules, for a message that says to leave them out."""
    places = {place.path: place for place in all_layers(bank)}
    found: dict[str, None] = {}
    for path in paths:
        if path not in places:
            found["modules_to_save"] = None
            continue
        slots = places[path].slots.values()
        own = {role for slot in slots for role in slot.extras}
        settings = [setting for role, setting in _SETTINGS.items() if role in own]
        found |= dict.fromkeys(settings or ["targets (exclude=[...])"])
    return " and ".join(found)


def saved_paths(bank: AdapterBank) -> list[str]:
    """Modules that adapters train in full, which no block computes itself."""
    return [path for path, module in saved_modules(bank).modules.items() if module.slots]


def _found_blocks(bank: AdapterBank) -> list[FusedBlock]:
    return [m._compiled_call_impl for m in bank.model.modules() if isinstance(m._compiled_call_impl, FusedBlock)]


def takes_tables(routing: Routing) -> bool:
    """Whether a route is all in its tables: one slot a row, no weights."""
    return not any(part.weights_U is not None for plan in routing.plans.values() for part in plan)
