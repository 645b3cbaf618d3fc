"""Where a causal language model's body ends and its output head begins, so that the loss can go through the head in chunks.

The split is believed only after a probe: body and head apart must give the model's own logits. A model that does more between
them (scaled or capped logits) fails the probe and takes the plain path, which holds all logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import BASE
from lorabank.engine.modes import evaluation_mode


@dataclass(frozen=True)
class SplitHead:
    """The model's body and its linear output head."""

    body: nn.Module
    head: nn.Linear

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (N, L, H)."""
        return self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True).last_hidden_state


def split_head(bank: AdapterBank) -> SplitHead | None:
    """The split, checked on a probe of four tokens, or None when the model's logits are not simply head(body(x))."""
    model = bank.model
    if not isinstance(model, PreTrainedModel):
        return None
    head, body = model.get_output_embeddings(), model.base_model
    # an adapted head must be called, and a body that is the whole model has no head to take apart
    if isinstance(head, LoRALayer) or not isinstance(head, nn.Linear) or body is model:
        return None
    split = SplitHead(body, head)
    ids = torch.arange(4, device=head.weight.device)[None] % max(1, head.out_features)
    with torch.no_grad(), evaluation_mode(model), bank.route(BASE):
        mask = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = head(split.hidden(ids, mask).to(head.weight.dtype))
    return split if torch.equal(expected, found) or torch.allclose(expected, found, rtol=1e-5, atol=1e-6) else None
