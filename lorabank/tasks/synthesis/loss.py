"""SpeechT5's loss, a sum a row: L1 of the mel spectrum before and after the postnet, the end's cross-entropy, guided attention.

It is transformers' own criterion (`SpeechT5SpectrogramLoss`), row by row on the row's own frames. N rows, T frames, M mel bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabank.engine.model_batch import Tensors

MEL, FRAMES, TOKENS, DRAWS = "mel", "frames", "tokens", "draws"
"""Targets: (N, T, M) log-mel spectra; (N,) frames, tokens and seeds of each row."""


class SeededPrenet(nn.Module):
    """SpeechT5's prenet of the decoder with dropout drawn a row, from the row's own seed.

    That dropout is on at all times (Tacotron 2, arXiv:1712.05884, section 2.2), and the library draws one mask for all rows of a
    batch from the global state: what an adapter learns would depend on its company.
    """

    def __init__(self, prenet: Any, draws: list[int], lengths: list[int]) -> None:
        super().__init__()
        self.prenet, self.draws, self.lengths = prenet, draws, lengths

    def forward(self, input_values: Tensor, speaker_embeddings: Tensor | None = None) -> Tensor:
        """(N, T, M) and (N, D) → (N, T, hidden)."""
        prenet, x = self.prenet, input_values
        share = prenet.config.speech_decoder_prenet_dropout
        for number, layer in enumerate(prenet.layers):
            x = F.relu(layer(x))
            x = x * self._kept(x, share, number) / (1 - share)
        x = prenet.encode_positions(prenet.final_layer(x))
        if speaker_embeddings is None:
            return x
        speakers = F.normalize(speaker_embeddings).unsqueeze(1).expand(-1, x.shape[1], -1)
        return F.relu(prenet.speaker_embeds_layer(torch.cat([x, speakers], -1)))

    def _kept(self, x: Tensor, share: float, number: int) -> Tensor:
        """(N, T, units): 1 with the chance `share`, as the library has it; a row's is the same however it is padded."""
        mask = torch.zeros(x.shape)
        for row, (draw, length) in enumerate(zip(self.draws, self.lengths, strict=True)):
            generator = torch.Generator().manual_seed((draw * 31 + number) % 2**63)
            mask[row, :length] = (torch.rand(length, x.shape[2], generator=generator) < share).float()
        return mask.to(x.device, x.dtype)


@contextlib.contextmanager
def seeded(model: Any, draws: list[int], lengths: list[int]) -> Iterator[None]:
    """The model with a seeded prenet, for a pass."""
    decoder = model.speecht5.decoder
    before = decoder.prenet
    decoder.prenet = SeededPrenet(before, draws, lengths)
    try:
        yield
    finally:
        decoder.prenet = before


def synthesis_loss(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """The loss of each row (N,): the mean over its frames times their number."""
    return _losses(model, inputs, targets)[0]


def loss_and_error(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """(N, 2): the loss, and the mean absolute error of the final spectrum."""
    return torch.stack(_losses(model, inputs, targets), 1)


def _losses(model: Any, inputs: Tensors, targets: Tensors) -> tuple[Tensor, Tensor]:
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpectrogramLoss

    config, postnet = model.config, model.speech_decoder_postnet
    step = config.reduction_factor
    frames, tokens, draws = (targets[name].tolist() for name in (FRAMES, TOKENS, DRAWS))
    mel = targets[MEL].to(inputs["speaker_embeddings"].dtype)
    given = F.pad(mel[:, step - 1 :: step], (0, 0, 1, 0))[:, :-1]  # what came before, beginning with silence
    steps = [count // step for count in frames]
    mask = torch.arange(given.shape[1], device=mel.device) < torch.tensor(steps, device=mel.device)[:, None]
    with seeded(model, draws, steps):
        body = model.speecht5(
            input_values=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_values=given,
            decoder_attention_mask=mask.long(),
            speaker_embeddings=inputs["speaker_embeddings"],
            output_attentions=config.use_guided_attention_loss,
            use_cache=False,
            return_dict=True,
        )
    hidden = body[0]
    before = postnet.feat_out(hidden).view(len(hidden), -1, config.num_mel_bins)
    ends = postnet.prob_out(hidden).view(len(hidden), -1)
    criterion = SpeechT5SpectrogramLoss(config).to(mel.device)
    losses, errors = [], []
    for row, (count, words) in enumerate(zip(frames, tokens, strict=True)):
        own = before[row : row + 1, :count]
        after = postnet.postnet(own)  # convolutions over frames: of its own alone, or they would see the padding
        attentions = None
        if config.use_guided_attention_loss:
            attentions = [each[row : row + 1, :, : count // step, :words].float() for each in body.cross_attentions]
        there = torch.ones(1, words, dtype=torch.long, device=mel.device)
        truth = targets[MEL][row : row + 1, :count].float()
        loss = criterion(there, own.float(), after.float(), ends[row : row + 1, :count].float(), truth, attentions)
        losses.append(loss * count)
        errors.append((after.float() - truth).abs().mean().detach())
    return torch.stack(losses), torch.stack(errors)
