"""`attach`: an `AdapterBank` over a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.bank import AdapterBank
from lorabank.bank.fused_layers import Declared, declared_slices
from lorabank.bank.in_full.heads import check_head
from lorabank.bank.keep import kept_parameters, warn_stopped
from lorabank.bank.reach import is_attached
from lorabank.bank.target_parts import matches
from lorabank.bank.wrapping import Adapted
from lorabank.errors import LorabankError


def attach(
    model: nn.Module,
    *,
    keep_trainable: str | Sequence[str] = (),
    fused: Declared | None = None,
    head: str | None = None,
) -> AdapterBank:
    """Freeze `model` and return a bank of adapters over it. No layer changes until an adapter needs it.

    Any `nn.Module` will do. `keep_trainable`: parameters, or modules with all of theirs, that go on training: a bottleneck, a
    prefix, another PEFT method's, a head. Names, ends of paths, globs or `re:…`, as in `targets`, which never means them.

    `fused`: linear layers that are several projections in one, with the names of these in order, as `{"qkv": ["q", "k", "v"]}`
    for equal parts or `{"qkv": {"q": 64, "k": 16, "v": 16}}`. `targets` can name each then (`qkv.q`). Those of many of
    transformers' models are known.

    `head`: of a classifier of your own, the module that gives a number a label, such as "fc": each adapter gets one of its own,
    with as many labels as `bank.add(…, num_labels=n)` says. That of transformers' classifiers is known.

    Raises LorabankError when the model already has a bank, ConfigError for a name that nothing in the model has.

    A layer that maps 4 features to 3 has 3 × 4 = 12 weights. LoRA of rank 1 leaves them frozen and trains a column B (3 × 1)
    and a row A (1 × 4), 7 numbers, whose product is the change of the weight:

    >>> import torch
    >>> import lorabank as lb
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    >>> bank = lb.attach(model)
    >>> bank.add("tiny", lb.AdapterConfig(rank=1, alpha=1))
    >>> sum(p.numel() for p in bank.parameters("tiny")), model[0].weight.numel()
    (7, 12)
    >>> bank.adapter("tiny").layers["0"].delta().shape
    torch.Size([3, 4])

    B starts at zero, so the model's answers are still the base's. One step of any optimizer changes them, and not the base:

    >>> x = torch.ones(2, 4)
    >>> with bank.route(["tiny", lb.BASE]):
    ...     bool(torch.equal(model(x)[0], model(x)[1]))
    True
    >>> optimizer = torch.optim.SGD(bank.parameters("tiny"), lr=0.1)
    >>> model(x).sum().backward()
    >>> optimizer.step()
    >>> with bank.route(["tiny", lb.BASE]):
    ...     bool(torch.equal(model(x)[0], model(x)[1]))
    False
    >>> bank.detach() is model and torch.nn.Linear is type(model[0])
    True
    """
    if not isinstance(model, nn.Module):
        raise LorabankError(
            f"attach: expected a torch.nn.Module, got {type(model).__name__}. Load the model first; lorabank adapts PyTorch "
            "models only."
        )
    if is_attached(model):
        raise LorabankError("attach: this model already has a bank. Use that bank, or detach it first (bank.detach()).")
    taken = next((path for path, module in model.named_modules() if isinstance(module, Adapted) or is_attached(module)), None)
    if taken is not None:
        raise LorabankError(
            f"attach: a part of this model, {taken!r}, belongs to a bank already. Use that bank, or detach it first."
        )
    kept = kept_parameters(model, keep_trainable, matches)
    warn_stopped(model, kept)
    slices = declared_slices(adaptable_layers(model), fused or {}, matches)
    return AdapterBank(model, kept, slices, None if head is None else check_head(model, head))
