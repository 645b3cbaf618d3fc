"""A batch of recordings with their labels, and the loss of each: teacher-forced negative log-likelihood, summed over its tokens.

N rows, L labels, H hidden features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.wrapping import Adapted
from lorabank.kernels.loss import token_logprobs
from lorabank.tasks.speech.hearing import heard
from lorabank.tasks.speech.rows import SpeechRow

MULTIPLE = 8
"""Labels are padded to a multiple of it: passes come in few shapes."""


def label_tensors(rows: Sequence[SpeechRow], pad: int, longest: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(decoder_input_ids, {targets, weights}), each (N, L): what the decoder reads, what it should say next, and which count.

    The prefix is given, so it has weight 0; so has padding, which a causal decoder's tokens don't see.
    """
    length = max(len(row.labels) - 1 for row in rows)
    length = min(-(-length // MULTIPLE) * MULTIPLE, longest)
    read = torch.full((len(rows), length), pad)
    said, weights = torch.full((len(rows), length), pad), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.labels)
        read[i, : len(ids) - 1], said[i, : len(ids) - 1] = ids[:-1], ids[1:]
        weights[i, row.prefix - 1 : len(ids) - 1] = 1.0
    return {"decoder_input_ids": read}, {"targets": said, "weights": weights}


def transcript_loss(model: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Σ −log p over each row's learned tokens (N,), nats. The head's logits of a whole batch are never held at once."""
    decoder, head = model.get_submodule("model.decoder"), model.get_submodule("proj_out")
    encoded = heard(model, inputs["input_features"])
    out: Any = decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=encoded, use_cache=False)
    hidden, said = out.last_hidden_state.flatten(0, 1), targets["targets"].flatten()
    if isinstance(head, nn.Linear) and not isinstance(head, Adapted):
        logprobs = token_logprobs(hidden, head.weight, said, head.bias)
    else:  # an adapted head must be called
        logprobs = head(hidden).float().log_softmax(-1).gather(1, said[:, None]).squeeze(1)
    return -(logprobs.view_as(targets["weights"]) * targets["weights"]).sum(1)
