"""From log-mel spectra to sound: a HifiGan where one is given, else Griffin-Lim."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabank.errors import ModelError
from lorabank.models.quiet import quiet_transformers

ROUNDS = 32
"""Of Griffin-Lim."""
MOMENTUM = 0.99
"""Of its fast form (Perraudin, Balazs and Søndergaard 2013)."""


def griffin_lim(mel_TM: Tensor, features: Any, rounds: int = ROUNDS) -> np.ndarray:
    """Samples (S,) from −1 to 1 whose spectrum is near log10 mel energies (frames, bins), by the numbers of a feature extractor.

    Griffin and Lim 1984: phases are guessed, and made consistent in rounds. Deterministic.
    """
    filters = torch.as_tensor(features.mel_filters, dtype=torch.float32)  # (frequencies, bins)
    size, hop, width = int(features.n_fft), int(features.sample_stride), int(features.sample_size)
    window = torch.as_tensor(np.asarray(features.window), dtype=torch.float32)
    frames, least = len(mel_TM), size // hop + 1
    mel_TM = torch.nn.functional.pad(mel_TM.float(), (0, 0, 0, max(0, least - frames)), value=-10.0)
    magnitude = (torch.linalg.pinv(filters.T) @ (10.0**mel_TM.T)).clamp(min=0)
    settings: dict[str, Any] = {"n_fft": size, "hop_length": hop, "win_length": width, "window": window}
    generator = torch.Generator().manual_seed(0)
    phase = torch.exp(2j * torch.pi * torch.rand(magnitude.shape, generator=generator))
    earlier = torch.zeros_like(phase)
    for _ in range(rounds):
        sound = torch.istft(magnitude * phase, **settings)
        now = torch.stft(sound, **settings, return_complex=True)[:, : magnitude.shape[1]]
        now = torch.nn.functional.pad(now, (0, magnitude.shape[1] - now.shape[1]))
        ahead = now + MOMENTUM * (now - earlier)
        phase, earlier = ahead / ahead.abs().clamp(min=1e-8), now
    sound = torch.istft(magnitude * phase, **settings)
    return sound[: frames * hop].clamp(-1, 1).numpy()


def load_vocoder(name: str, device: torch.device) -> Any:
    """A SpeechT5HifiGan by its folder or hub id. Raises ModelError."""
    from transformers import SpeechT5HifiGan

    from lorabank.models.load import locate

    try:
        folder = locate(name, trust_remote_code=False, say=lambda line: None)
    except ModelError as error:  # which speaks of the base model
        what = str(error).removeprefix(f"model {name!r}: ").partition(". Name a local folder")[0]
        raise ModelError(f"synthesis.vocoder {name!r}: {what}. Name the folder or hub id of a SpeechT5HifiGan.") from error
    try:
        with quiet_transformers():
            loaded: Any = SpeechT5HifiGan.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except Exception as error:  # a damaged file surfaces as one of a dozen classes
        raise ModelError(
            f"synthesis.vocoder {name!r}: can't be read as a SpeechT5HifiGan: {str(error).splitlines()[0]}"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # the library would make random ones of any other model's file
        raise ModelError(
            f"synthesis.vocoder {name!r}: is no SpeechT5HifiGan: its files lack {missing[0]} and {len(missing) - 1} more"
        )
    torch.nn.Module.to(model, device)  # PreTrainedModel's own `to` is typed wrongly
    return model.eval()
