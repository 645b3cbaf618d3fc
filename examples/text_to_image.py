"""Two styles learned in one pass over a tiny diffusion pipeline made here: it shows the steps, and draws nothing to hang up.

    python examples/text_to_image.py                                    # about a minute on two CPU cores; needs diffusers
    python examples/text_to_image.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512     # on a GPU

The pictures are circles and squares: `warm` has them in reds on cream, `cold` in blues on white.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import lorabank as lb
from lorabank import api

PALETTES = {"warm": ("#fff3d6", "#c0392b"), "cold": ("#ffffff", "#1f4e9c")}


def pictures(folder: Path, style: str, count: int, side: int) -> Path:
    """`count` pictures of a style with their captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    chance, (ground, ink) = random.Random(style), PALETTES[style]
    lines = []
    for i in range(count):
        shape, size = chance.choice(["circle", "square"]), chance.uniform(0.2, 0.4) * side
        x, y = (chance.uniform(size, side - size) for _ in "xy")
        page = Image.new("RGB", (side, side), ground)
        pen = ImageDraw.Draw(page)
        draw = pen.ellipse if shape == "circle" else pen.rectangle
        draw((x - size, y - size, x + size, y + size), fill=ink)
        page.save(folder / f"{i:02}.png")
        lines.append(f'{{"file_name": "{i:02}.png", "text": "a {shape}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def tiny_pipeline(folder: Path) -> Path:
    """A random Stable Diffusion pipeline whose every part is small."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 16
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pipeline's folder or hub id (default: a tiny random one)")
    parser.add_argument("--output", type=Path, default=Path("out/text-to-image"))
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = args.model or str(tiny_pipeline(Path(work) / "pipeline"))
        adapters = {name: {"data": str(pictures(Path(work) / name, name, 24, 2 * args.resolution))} for name in PALETTES}
        lb.train(
            model=model,
            task="text-to-image",
            output=str(args.output),
            adapters=adapters,
            rank=8,
            learning_rate=3e-3 if args.model is None else 1e-4,
            batch_size=4,
            max_steps=args.steps,
            eval={"every": max(1, args.steps // 3)},
            data={"val_split": 4},
            diffusion={
                "resolution": args.resolution,
                "bucket_step": 8,
                "min_side": 16,
                "sample_prompts": ["a circle", "a square"],
                "sample_steps": 20,
                "save_format": "kohya",
            },
        )
        mix = {"prompt": "a circle", "mix": ["warm:0.5,cold:0.5"], "steps": 20}
        print(api.predict(args.output, "", args.output / "drawn", options=mix))


if __name__ == "__main__":
    main()
