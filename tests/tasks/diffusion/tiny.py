"""Tiny random pipelines of every family with tokenizers, folders of pictures, and models over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from lorabank.tasks.diffusion.families import FAMILIES
from lorabank.tasks.diffusion.model import ImageModel
from tests.formats import pipelines
from tests.formats.pipelines import WIDTH

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """A token a letter."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    made = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.model_max_length = 12
    return made


def t5_tokenizer() -> T5TokenizerFast:
    """A token a letter, too."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    made = T5TokenizerFast(vocab=words, extra_ids=0)
    made.model_max_length = 10
    return made


def sd2() -> StableDiffusionPipeline:
    """SD 2.x: linear projections, heads by level, and v predicted."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    ).eval()
    return StableDiffusionPipeline(
        vae=pipelines._vae(),
        text_encoder=pipelines._clip(CLIPTextModel),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """SD 3: a transformer over both CLIPs and T5, a flow."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    torch.manual_seed(3)
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=pipelines._vae(),
        text_encoder=pipelines._clip(CLIPTextModelWithProjection),
        tokenizer=None,
        text_encoder_2=pipelines._clip(CLIPTextModelWithProjection),
        tokenizer_2=None,
        text_encoder_3=t5,
        tokenizer_3=None,
    )


PIPELINES: Mapping[str, Callable[[], Any]] = {**pipelines.PIPELINES, "sd2": sd2, "sd3": sd3}
FAMILY: Mapping[str, str] = {name: "sd" if name == "sd2" else name for name in PIPELINES}


def pipeline(name: str) -> Any:
    """A pipeline that reads captions."""
    pipe = PIPELINES[name]()
    for suffix in ("", "_2", "_3"):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if encoder is not None:
            made = t5_tokenizer() if isinstance(encoder, T5EncoderModel) else clip_tokenizer()
            pipe.register_modules(**{f"tokenizer{suffix}": made})
    more = {"requires_safety_checker": False} if FAMILY[name] == "sd" else {}
    pipe = type(pipe)(**pipe.components, **more)  # it looks at its tokenizers as it is made
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_of(pipe: Any, name: str, trained: Sequence[str] = ()) -> ImageModel:
    """Ours of a pipeline."""
    family = FAMILIES[FAMILY[name]]
    return ImageModel(
        family,
        getattr(pipe, family.denoiser),
        scheduler=pipe.scheduler,
        encoders={n: getattr(pipe, n) for n in family.encoders},
        tokenizers={n: getattr(pipe, n.replace("text_encoder", "tokenizer")) for n in family.encoders},
        trained=trained,
        vae=pipe.vae,
        zero_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
    )


@cache
def saved(name: str, folder: Path) -> Path:
    """A pipeline's folder."""
    path = folder / name
    pipeline(name).save_pretrained(path)
    return path


def picture(seed: int, width: int = 80, height: int = 80) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def folder_of_pictures(folder: Path, count: int, *, seed: int = 0, sizes: Sequence[tuple[int, int]] = ((80, 80),)) -> Path:
    """Pictures with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(seed + i, *sizes[i % len(sizes)]).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a cat {LETTERS[i % 26]}")
    return folder


def tiny_vae() -> AutoencoderKL:
    """Of two levels."""
    return pipelines._vae()
