"""From samples to what the decoder attends to: log-Mel features by transformers' extractor, and the encoder over a window.

N rows, S samples, M Mel bins, F frames (100 a second), P positions of the encoder (50 a second), H hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabank.errors import ConfigError, Setting

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

KEPT_BYTES = 2**30
"""Features of a run that are kept: about 1,100 rows of 30 seconds, 9½ hours."""


class Hearing:
    """Makes features of recordings for one model and one window."""

    def __init__(
        self, extractor: WhisperFeatureExtractor, model: nn.Module, window: float, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        config: Any = model.config
        stride = 2  # of the second convolution, as in every Whisper
        self.whole_frames = int(config.max_source_positions) * stride
        """Frames of the model's own window."""
        self.extractor = extractor
        self._kept: dict[str, Tensor] = {}
        self._room = kept_bytes
        self.rate = int(extractor.sampling_rate)
        self.hop = int(extractor.hop_length)
        wanted = round(window * self.rate / self.hop / stride) * stride
        self.frames = min(wanted, self.whole_frames)
        """Frames of a window; even."""
        if not self.frames:
            raise ConfigError(Setting("speech.window"), f": {window:g} s is less than two frames of {self.hop / self.rate:g} s")
        if extractor.feature_size != config.num_mel_bins:
            raise ConfigError(
                f"model: its features have {extractor.feature_size} Mel bins, and its first layer takes {config.num_mel_bins}: "
                "they are of two models"
            )

    @property
    def window(self) -> float:
        """Seconds that the model hears at once."""
        return self.frames * self.hop / self.rate

    def frames_of(self, seconds: float) -> int:
        """Frames of a recording that hold audio, at most the window's."""
        return min(math.ceil(seconds * self.rate / self.hop), self.frames)

    def remembered(self, sounds: Sequence[tuple[str | None, Callable[[], np.ndarray]]], device: torch.device) -> Tensor:
        """`features` of (name of the samples, what gives them). What was made under a name is kept while there is room, so that
        later passes over the same data only read it."""
        made = []
        for key, samples in sounds:
            features = None if key is None else self._kept.get(key)
            if features is None:
                features = self.features([samples()], device)[0]
                if key is not None and features.nbytes <= self._room:
                    self._room -= features.nbytes
                    self._kept[key] = features
            made.append(features)
        return torch.stack(made)

    def forget(self) -> None:
        """Drop what was kept."""
        self._room += sum(features.nbytes for features in self._kept.values())
        self._kept.clear()

    def features(self, samples: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """float32 features (N, M, F), on the host, of recordings (S,), each filled up with silence to the window. A GPU does the
        arithmetic where `device` is one.

        Each is made by itself, so that a row's numbers don't depend on its neighbours.
        """
        size = self.frames * self.hop
        where = str(device) if device.type == "cuda" else "cpu"
        made = [
            self.extractor(
                one[:size], sampling_rate=self.rate, padding="max_length", max_length=size, return_tensors="pt", device=where
            ).input_features
            for one in samples
        ]
        return torch.cat(made)


def heard(model: nn.Module, features_NMF: Tensor) -> Tensor:
    """The encoder's last hidden states (N, P, H). Fewer frames than the model's 30 seconds use its first positions alone.

    For all its frames it is the encoder's own forward; for fewer, which that refuses, the same layers in the same order.
    """
    encoder: Any = model.get_submodule("model.encoder")
    features = features_NMF.to(encoder.conv1.weight.dtype)
    if features.shape[-1] == 2 * encoder.config.max_source_positions:
        return encoder(features).last_hidden_state
    x = nn.functional.gelu(encoder.conv1(features))
    x = nn.functional.gelu(encoder.conv2(x)).permute(0, 2, 1)
    x = x + encoder.embed_positions(torch.arange(x.shape[1], device=x.device))
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)
