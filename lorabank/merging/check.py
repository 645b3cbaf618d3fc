"""`check_merged`: does the model answer the same with an adapter merged as with it beside the base?"""

from __future__ import annotations

from torch import nn

from lorabank.formats.adapter import Adapter
from lorabank.merging.merge import merge
from lorabank.merging.outputs import Inputs, LogitsCheck


def check_merged(
    model: nn.Module, adapter: Adapter, inputs: Inputs, *, strength: float = 1.0, force: bool = False
) -> LogitsCheck:
    """Run `model` on `inputs` plain, with `adapter` beside it, and merged; the model is afterwards as it was, bit for bit.

    inputs: a batch of the model, as a dict (called as `model(**inputs)`) or one tensor. Route an attached model to `BASE`.
    Raises what `merge` raises.
    """
    handle = merge(model, adapter, strength=strength, force=force, inputs=inputs, say=None)
    handle.unmerge()
    assert handle.logits is not None  # inputs were given
    return handle.logits
