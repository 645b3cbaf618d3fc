"""SpecAugment's masks (arXiv:1904.08779, section 2, without time warping), in the terms of transformers' `WhisperConfig`.

A row's masks follow from its own draw alone, so an adapter trained beside others sees those that it would see alone (law 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabank.config.speech import SpeechConfig


def masked(features_NMF: Tensor, frames: Sequence[int], draws: Sequence[int], speech: SpeechConfig) -> Tensor:
    """Features (N, M, F) with spans of frames and of Mel bins set to zero. `frames`: how many of each row hold audio; time is
    masked within them alone. Rows whose draw is 0, as those of evaluations are, stay as they are."""
    found = features_NMF.clone()
    for row, heard, draw in zip(found, frames, draws, strict=True):
        if not draw:
            continue
        generator = torch.Generator().manual_seed(draw)
        for start in spans(speech.mask_time_prob, speech.mask_time_length, min(heard, row.shape[1]), generator):
            row[:, start : start + speech.mask_time_length] = 0.0
        for start in spans(speech.mask_feature_prob, speech.mask_feature_length, row.shape[0], generator):
            row[start : start + speech.mask_feature_length] = 0.0
    return found


def spans(share: float, length: int, size: int, generator: torch.Generator) -> list[int]:
    """Where the spans start that cover at most `share` of `size` places: `share · size / length` of them, rounded up or down by
    chance so that they are so many on average. They may overlap; where a span is longer than what there is, there are none."""
    chance = float(torch.rand((), generator=generator))
    count = int(share * size / length + chance)
    if not count or size < length:
        return []
    return torch.randint(size - length + 1, (count,), generator=generator).tolist()
