"""`attach`: an `AdapterBank` over a model."""

from __future__ import annotations

from torch import nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.errors import LorabankError


def attach(model: nn.Module) -> AdapterBank:
    """Freeze `model` and return a bank of adapters over it. No layer changes until an adapter needs it.

    Any `nn.Module` will do. Raises LorabankError when the model already has a bank with adapters.
    """
    if not isinstance(model, nn.Module):
        raise LorabankError(f"attach: expected a torch.nn.Module, got {type(model).__name__}. Load the model first; lorabank adapts PyTorch models only.")
    taken = next((path for path, module in model.named_modules() if isinstance(module, LoRALayer)), None)
    if taken is not None:
        raise LorabankError(f"attach: the model already has a bank (layer {taken!r} is wrapped). Use that bank, or detach it first.")
    return AdapterBank(model)
