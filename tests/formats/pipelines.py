"""Tiny random pipelines of each family of image models, and adapters of them. Text goes in as ids: no tokenizer is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import config_of

IDS = torch.tensor([[0, 5, 9, 3, 7, 1, 1, 1]])
WIDTH = 32


def _clip(kind: Any, width: int = WIDTH) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def _vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        shift_factor=0.1,
    ).eval()


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd() -> StableDiffusionPipeline:
    """SD 1.x: convolutional proj_in, one text encoder, a first up block without attention."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=None,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL: linear proj_in, two transformer blocks deep, two text encoders, an embedding of sizes."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=8,
    ).eval()
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_scheduler(),
    )


def flux() -> FluxPipeline:
    """Flux: double and single blocks, CLIP and T5."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    torch.manual_seed(3)
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=None,
        text_encoder_2=t5,
        tokenizer_2=None,
        transformer=transformer,
    )


PIPELINES: Mapping[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl, "flux": flux}


def holder(pipe: Any) -> nn.Module:
    """The pipeline's models as children of one module, under their names."""
    module = nn.Module()
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        part = getattr(pipe, name, None)
        if isinstance(part, nn.Module):
            module.add_module(name, part)
    return module


@torch.no_grad()
def picture(pipe: Any) -> Tensor:
    """What the pipeline paints in two steps from fixed noise, text through its encoders; float32 in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    common = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    first = pipe.text_encoder(IDS, output_hidden_states=True)
    if isinstance(pipe, FluxPipeline):
        latents = noise.view(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)
        text = pipe.text_encoder_2(IDS)[0]
        return pipe(
            prompt_embeds=text, pooled_prompt_embeds=first.pooler_output, latents=latents, guidance_scale=3.0, **common
        ).images
    if isinstance(pipe, StableDiffusionXLPipeline):
        second = pipe.text_encoder_2(IDS, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=second.text_embeds,
            negative_prompt_embeds=torch.zeros_like(text),
            negative_pooled_prompt_embeds=torch.zeros_like(second.text_embeds),
            latents=noise,
            guidance_scale=3.0,
            **common,
        ).images
    text = first.last_hidden_state
    return pipe(
        prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), latents=noise, guidance_scale=3.0, **common
    ).images


CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
ATTENTION = (*CLIP, "to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "proj_mlp")
CONV = ("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "proj_out", "norm.linear")


def adapter_of(
    model: nn.Module, leaves: tuple[str, ...] = ATTENTION + CONV, *, even: bool = False, seed: int = 0, size: float = 0.5
) -> Adapter:
    """A random adapter, trained-like, of ranks 2 to 4 and several scalings (`even`: of one rank and α = rank)."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, AdapterLayer] = {}
    for path, module in model.named_modules():
        if not path.endswith(leaves) or not isinstance(module, nn.Linear | nn.Conv2d) or "T5" in path or ".block." in path:
            continue
        out, width, *kernel = module.weight.shape
        number = len(layers)
        rank, scaling = (4, 1.0) if even else (2 + number % 3, (0.5, 1.0, 2.0)[number % 3])
        A = torch.randn(rank, width, *kernel, generator=generator) / math.sqrt(width * math.prod(kernel))
        B = torch.randn(out, rank, generator=generator) * (size / math.sqrt(rank))
        layers[path] = AdapterLayer(A, B, scaling)
    layers = dict(sorted(layers.items()))
    return Adapter(config=config_of(layers), layers=layers)


@cache
def adapter_for(name: str, leaves: tuple[str, ...] = ATTENTION + CONV, *, even: bool = False) -> Adapter:
    """`adapter_of` the pipeline of this name."""
    return adapter_of(holder(PIPELINES[name]()), leaves, even=even)


def decomposed(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same with DoRA's magnitudes, a little off the base's norms."""
    layers = {
        path: replace(
            layer, magnitude=model.get_submodule(path).get_parameter("weight").detach().flatten(1).norm(dim=1) * 1.1 + 0.01
        )
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, config=config_of(layers), layers=layers)
