"""`DiffusionConfig`: settings of image generation. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabank.config.checks import (
    check_choice,
    check_fraction,
    check_non_negative,
    check_positive,
    check_positive_int,
    freeze_sequences,
)
from lorabank.errors import ConfigError, Setting

NO_CAPTION = ("stop", "drop", "empty")
CACHES = ("memory", "disk", "none")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
SAVE_FORMATS = ("peft", "kohya", "diffusers")

ATTENTION = r"re:(unet|transformer)\..*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
"""The denoiser's attention."""
TEXT_ATTENTION = r"re:text_encoder(_2)?\..*self_attn\.(q|k|v|out)_proj"


def adapter_defaults(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What adapters of images have where nobody says otherwise. `settings`: section to what was given."""
    text = str(settings["diffusion"].get("text_encoders", False)).lower() in ("true", "yes", "1")
    return {"targets": [ATTENTION, TEXT_ATTENTION] if text else ATTENTION}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Pictures, captions, noise, and what is drawn along the way."""

    resolution: int = 512
    """Pictures have at most this number squared of pixels."""
    buckets: bool = True
    """Keep pictures' aspect ratios, about; else all are cropped to squares."""
    bucket_step: int = 64
    """Pixels that every side is a multiple of."""
    max_aspect: float = 2.0
    """Longest side over the shortest."""
    min_side: int = 64
    """Pixels; a picture with a shorter side is tiny, a bad row (`data.bad_rows`)."""
    no_caption: str = "stop"
    """What follows where a picture's caption is missing or empty: `stop` with an error that names it (more often a whole folder's
    captions are missing than one), `drop` and count it, or train it without one: `empty`."""
    caption: str | None = None
    """Column of the caption in metadata; None: `text` or `caption`."""
    trigger: str = ""
    """Words put before every caption, such as a rare name for a style."""
    cache: str = "memory"
    """Where latents and text embeddings are kept: `memory`, `disk` (`cache_dir`), or `none`: made anew in each pass."""
    cache_dir: str | None = None
    """Folder for `cache: disk`."""
    caption_dropout: float = 0.0
    """Share of rows trained without their caption, for guidance."""
    noise_offset: float = 0.0
    """Added to the noise, one normal number a channel times this: darker and lighter pictures (about 0.1)."""
    min_snr: float | None = None
    """γ of min-SNR weighting (5 in arXiv:2303.09556); None: off."""
    prediction: str | None = None
    """What the model predicts, where its scheduler's configuration is wrong."""
    text_encoders: bool = False
    """Let adapters change the text encoders too; captions are encoded in each pass then."""
    prior_prompt: str | None = None
    """Caption of the class that an object is one of (`a photo of a dog`): prior preservation (DreamBooth, arXiv:2208.12242)."""
    prior_prompts: Mapping[str, str] = field(default_factory=dict)
    """The same by adapter, where they aren't of one class."""
    prior_pictures: int = 100
    """Pictures of the class, drawn by the base before training, or found in `cache_dir`."""
    prior_weight: float = 1.0
    """What their loss counts beside the pictures'."""
    sample_prompts: Sequence[str] = ()
    """Captions drawn at each evaluation into the run's folder; none: those of held-out pictures, `eval.samples` of them."""
    sample_steps: int = 30
    sample_guidance: float = 7.5
    sample_height: int | None = None
    sample_width: int | None = None
    """Pixels of samples and predictions; None: `resolution`."""
    negative: str | None = None
    """What guidance leads away from; None: the empty caption."""
    save_format: str = "peft"
    """Also write each adapter as `kohya` or `diffusers` has it, beside PEFT's form."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        for name in ("resolution", "bucket_step", "min_side", "prior_pictures", "sample_steps"):
            check_positive_int(f"diffusion.{name}", getattr(self, name))
        for name in ("sample_height", "sample_width"):
            if getattr(self, name) is not None:
                check_positive_int(f"diffusion.{name}", getattr(self, name))
        check_choice("diffusion.no_caption", self.no_caption, NO_CAPTION)
        check_choice("diffusion.cache", self.cache, CACHES)
        check_choice("diffusion.save_format", self.save_format, SAVE_FORMATS)
        if self.prediction is not None:
            check_choice("diffusion.prediction", self.prediction, PREDICTIONS)
        check_fraction("diffusion.caption_dropout", self.caption_dropout)
        if self.min_snr is not None:
            check_positive("diffusion.min_snr", self.min_snr)
        for name in ("noise_offset", "prior_weight", "sample_guidance"):
            check_non_negative(f"diffusion.{name}", getattr(self, name))
        check_positive("diffusion.max_aspect", self.max_aspect)
        named = {f"prior_prompts.{name}": prompt for name, prompt in self.prior_prompts.items()}
        for name, prompt in {"prior_prompt": self.prior_prompt, **named}.items():
            if prompt is not None and not prompt.strip():
                raise ConfigError(
                    Setting(f"diffusion.{name}"), " is empty. Name the class in it (a photo of a dog), or leave it out."
                )
