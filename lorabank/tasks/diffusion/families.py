"""The families of image models: how captions become conditions, and how each denoiser is called. One table: `FAMILIES`.

Shapes: N rows, C × H × W latents, L text tokens. A condition is a dictionary of tensors with one entry a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Condition = Mapping[str, Tensor]
Parts = Mapping[str, Any]
"""A pipeline's models by diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What pipelines of one kind have in common."""

    name: str
    denoiser: str
    """diffusers' name of the model that is trained."""
    encoders: tuple[str, ...]
    """Of the text encoders, in order."""
    encode: Callable[[Parts, Condition], dict[str, Tensor]]
    """(the models, token ids by encoder (N, L)) → the condition."""
    denoise: Callable[[Any, Tensor, Tensor, Condition], Tensor]
    """(the denoiser, noisy latents (N, C, H, W), times (N,), condition) → its prediction (N, C, H, W)."""
    sized: bool = False
    """Whether the condition holds the pictures' sizes."""
    distilled: bool = False
    """Whether guidance is a number that the model is told, not a second pass without the caption."""
    text_tokens: int | None = None
    """Of a T5 encoder; CLIP's are its tokenizer's."""


_T5_TOKENS = 256
"""Of a caption that Stable Diffusion 3 reads."""

# ---- captions to conditions ------------------------------------------------------------------------------------------


def _clip_text(parts: Parts, ids: Condition) -> dict[str, Tensor]:
    return {"text": parts["text_encoder"](ids["text_encoder"])[0]}


def _xl_text(parts: Parts, ids: Condition) -> dict[str, Tensor]:
    """Both encoders' last states but one; the second's projection beside."""
    first = parts["text_encoder"](ids["text_encoder"], output_hidden_states=True)
    second = parts["text_encoder_2"](ids["text_encoder_2"], output_hidden_states=True)
    return {"text": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), "pooled": second.text_embeds}


def _sd3_text(parts: Parts, ids: Condition) -> dict[str, Tensor]:
    """CLIP's states side by side and filled up to T5's width, then T5's states behind them; zeros where there is no T5."""
    first = parts["text_encoder"](ids["text_encoder"], output_hidden_states=True)
    second = parts["text_encoder_2"](ids["text_encoder_2"], output_hidden_states=True)
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    width = parts["transformer"].config.joint_attention_dim
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    if parts.get("text_encoder_3") is None:
        read = ids.get("text_encoder_3")  # not there in a pipeline without T5's tokenizer
        t5 = clip.new_zeros(len(clip), _T5_TOKENS if read is None else read.shape[1], width)
    else:
        t5 = parts["text_encoder_3"](ids["text_encoder_3"])[0].to(clip)
    return {"text": torch.cat([clip, t5], dim=1), "pooled": torch.cat([first.text_embeds, second.text_embeds], dim=-1)}


def _flux_text(parts: Parts, ids: Condition) -> dict[str, Tensor]:
    pooled = parts["text_encoder"](ids["text_encoder"]).pooler_output
    return {"text": parts["text_encoder_2"](ids["text_encoder_2"])[0], "pooled": pooled}


# ---- denoisers -------------------------------------------------------------------------------------------------------


def _unet(model: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
    return model(x, times, encoder_hidden_states=condition["text"], return_dict=False)[0]


def _xl_unet(model: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
    added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
    return model(x, times, encoder_hidden_states=condition["text"], added_cond_kwargs=added, return_dict=False)[0]


def _sd3(model: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
    return model(
        hidden_states=x,
        timestep=times,
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"],
        return_dict=False,
    )[0]


def _flux(model: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
    """Squares of 2 × 2 latents are its tokens. Times go in as shares; its guidance is a number a row."""
    rows, channels, height, width = x.shape
    tokens = x.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = tokens.reshape(rows, height * width // 4, 4 * channels)
    places = torch.cartesian_prod(
        torch.arange(1, device=x.device), torch.arange(height // 2, device=x.device), torch.arange(width // 2, device=x.device)
    ).to(x.dtype)
    text = condition["text"]
    guidance = condition["guidance"].to(x.dtype) if model.config.guidance_embeds else None
    found = model(
        hidden_states=tokens,
        timestep=times / 1000.0,
        guidance=guidance,
        pooled_projections=condition["pooled"],
        encoder_hidden_states=text,
        txt_ids=x.new_zeros(text.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
    found = found.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return found.reshape(rows, channels, height, width)


FAMILIES: Mapping[str, Family] = {
    "sd": Family(name="sd", denoiser="unet", encoders=("text_encoder",), encode=_clip_text, denoise=_unet),
    "sdxl": Family(
        name="sdxl",
        denoiser="unet",
        encoders=("text_encoder", "text_encoder_2"),
        encode=_xl_text,
        denoise=_xl_unet,
        sized=True,
    ),
    "sd3": Family(
        name="sd3",
        denoiser="transformer",
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        encode=_sd3_text,
        denoise=_sd3,
        text_tokens=_T5_TOKENS,
    ),
    "flux": Family(
        name="flux",
        denoiser="transformer",
        encoders=("text_encoder", "text_encoder_2"),
        encode=_flux_text,
        denoise=_flux,
        distilled=True,
        text_tokens=512,
    ),
}
"""Name → family. Stable Diffusion 2.x is `sd` with another text encoder and another prediction."""
