"""One base that draws emoji by name, two styles learned from it in the same passes, and a half-and-half mix of them.

    python studies/emoji_styles/prepare.py                       # once, with network
    python studies/emoji_styles/run.py --device cuda --output out/emoji

A small U-Net over pixels is pretrained on Noto Emoji, its text condition the icons' names as MiniLM reads them. Two LoRA adapters
over it, OpenMoji and Fluent Emoji Flat, are trained jointly: every pass holds rows of both. Names held out (with all their skin
tones) are seen by neither. The output has grid.png, results.json and both adapters in diffusers' form.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the machine with the GPU may have the folder only

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from grid import grid, held_out_names
from torch import Tensor, nn

import lorabank as lb
from lorabank.engine.own_pass import TrainingPass
from lorabank.formats.diffusers import save_diffusers
from lorabank.optim.schedules import learning_rate_factor
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from lorabank.tasks.diffusion.draws import draw, fixed_draw, mixed
from lorabank.tasks.diffusion.families import FAMILIES
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import Objective, objective_of, row_losses, row_tensors
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures
from lorabank.tasks.diffusion.speed import compile_image_model

HERE = Path(__file__).parent
BASE, STYLES = "noto", ("openmoji", "fluent")
DROPPED = 0.1
"""Share of rows that are trained without their name, for guidance."""
TEXT = 3.0
"""MiniLM's numbers are about a third of the usual size."""
PARTS = 4
"""Looks at each held-out picture in a validation, at as many places of the schedule."""
MIX = "mix 50:50"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All of the sets' pictures of the same icons."""

    pixels: Mapping[str, Tensor]
    """Style → uint8 (N, 3, S, S)."""
    text_NLD: Tensor
    captions: Sequence[str]
    weights_N: Tensor
    """Of each icon in training: icons that differ in the tone of skin count as one. 0 for those held out."""
    held: Sequence[int]
    """One icon of each name held out."""

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.pixels[BASE].shape[-1]

    def clean(self, style: str, rows: Tensor | Sequence[int]) -> Tensor:
        """fp32 in [−1, 1]."""
        return self.pixels[style][rows].float() / 127.5 - 1.0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    args.output.mkdir(parents=True, exist_ok=True)
    data = pictures_of(args.data, args.held_out, match=args.match, pool=args.pool)
    say(f"{len(data.captions)} icons, {len(data.held)} names held out: {', '.join(data.captions[i] for i in data.held)}")
    device = torch.device(args.device)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing"
    )
    unet = denoiser(args.width, data.text_NLD.shape[-1], data.size).to(device)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in unet.parameters()), "device": device_name(device)}
    if args.base is not None and args.base.exists():
        unet.load_state_dict(torch.load(args.base, map_location=device, weights_only=True))
    else:
        facts["pretraining"] = pretrain(unet, data, objective_of(scheduler), args)
        if args.base is not None:
            torch.save(unet.state_dict(), args.base)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = ImageModel(FAMILIES["sd"], unet.to(dtype).requires_grad_(False), scheduler=scheduler)
    bank = lb.attach(model)
    if not args.steps:
        return
    facts["styles"] = learn_styles(bank, model, data, objective_of(scheduler), args)
    facts["losses"] = losses_on_held_out(bank, model, data, objective_of(scheduler))
    facts["dark"] = show(bank, model, data, args)
    for name in STYLES:
        save_diffusers(bank.adapter(name), args.output / f"{name}.safetensors")
    (args.output / "results.json").write_text(json.dumps(facts, indent=1))
    say(json.dumps({key: facts[key] for key in ("losses", "dark")}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.npz")
    parser.add_argument("--output", type=Path, default=Path("out/emoji"))
    parser.add_argument("--match", help="a regular expression: the icons whose whole names it matches")
    parser.add_argument("--pool", type=int, default=1, help="average so many pixels a side into one")
    parser.add_argument("--base", type=Path, help="file of the pretrained weights: read if it is there, else written")
    parser.add_argument("--minutes", type=float, default=5.0, help="of pretraining")
    parser.add_argument("--pretrain-batch", type=int, default=256)
    parser.add_argument("--pretrain-rate", type=float, default=4e-4)
    parser.add_argument("--width", type=int, default=128, help="channels of the first level")
    parser.add_argument("--steps", type=int, default=1200, help="of both styles; 0: the base alone")
    parser.add_argument("--batch", type=int, default=64, help="rows of each style in a pass")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the names")
    parser.add_argument("--names", type=int, default=16, help="in the grid")
    parser.add_argument("--draw-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="the frozen base in bf16; unasked on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.bf16 = args.device.startswith("cuda") if args.bf16 is None else args.bf16
    return args


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pictures_of(path: Path, share: float, *, match: str | None = None, pool: int = 1) -> Pictures:
    if not path.exists():
        raise SystemExit(f"{path} is missing: run studies/emoji_styles/prepare.py first")
    with np.load(path) as file:
        styles, concepts = file["styles"].tolist(), file["concepts"].tolist()
        pixels = {style: torch.from_numpy(file["pictures"][i]).permute(0, 3, 1, 2).contiguous() for i, style in enumerate(styles)}
        text, captions = torch.from_numpy(file["text"]).float() * TEXT, file["captions"].tolist()
    kept = [i for i, caption in enumerate(captions) if match is None or re.fullmatch(match, caption)]
    captions, concepts, text = [captions[i] for i in kept], [concepts[i] for i in kept], text[kept]
    pixels = {style: F.avg_pool2d(each[kept].float(), pool).round().byte() for style, each in pixels.items()}
    held = held_out_names(concepts, share)
    counts = {name: concepts.count(name) for name in set(concepts)}
    weights = torch.tensor([0.0 if name in held else 1.0 / counts[name] for name in concepts])
    first = {name: concepts.index(name) for name in held}
    return Pictures(pixels=pixels, text_NLD=text, captions=captions, weights_N=weights, held=[first[name] for name in held])


def denoiser(width: int, text: int, size: int) -> UNet2DConditionModel:
    """Three levels, attention on the two lower ones."""
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=4,
        norm_num_groups=min(32, width),
    )


# ---- the base --------------------------------------------------------------------------------------------------------


def pretrain(unet: nn.Module, data: Pictures, objective: Objective, args: argparse.Namespace) -> dict[str, Any]:
    """Plain training of all weights for so many minutes; ends with their moving average."""
    device, start, step, shown = torch.device(args.device), time.monotonic(), 0, 0.0
    table = {key: value.to(device) for key, value in row_tensors([objective.at(t) for t in range(objective.steps)]).items()}
    clean, text = data.clean(BASE, slice(None)).to(device), data.text_NLD.to(device)
    weights = data.weights_N.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), args.pretrain_rate, weight_decay=0.01, fused=device.type == "cuda")
    average = [p.detach().clone() for p in unet.parameters()]
    losses: list[float] = []
    recent = torch.zeros((), device=device)
    unet.train().requires_grad_(True)
    while (share := (time.monotonic() - start) / (60 * args.minutes)) < 1.0:
        rate = args.pretrain_rate * min(1.0, (step + 1) / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.multinomial(weights, args.pretrain_batch, replacement=True)
        times = torch.randint(objective.steps, (len(rows),), device=device)
        batch = {key: value[times] for key, value in table.items()} | {"clean": clean[rows]}
        batch["noise"] = torch.randn_like(batch["clean"])
        caption = text[rows] * (torch.rand(len(rows), 1, 1, device=device) >= DROPPED)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            x = batch["signal"].view(-1, 1, 1, 1) * batch["clean"] + batch["noise_part"].view(-1, 1, 1, 1) * batch["noise"]
            predicted = unet(x, times, encoder_hidden_states=caption, return_dict=False)[0]
        loss = row_losses(batch, predicted).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, list(unet.parameters()), 1.0 - min(0.999, step / (step + 10)))
            recent = loss.detach() if step == 1 else recent.lerp(loss.detach(), 0.01)
        if share >= shown:
            losses.append(round(float(recent), 5))
            say(f"pretraining {share:4.0%}, step {step}, loss {losses[-1]:.4f}")
            shown += 0.1
    with torch.no_grad():
        for p, mean in zip(unet.parameters(), average, strict=True):
            p.copy_(mean)
    unet.eval().requires_grad_(False)
    return {"steps": step, "batch": args.pretrain_batch, "seconds": time.monotonic() - start, "losses": losses}


# ---- the styles ------------------------------------------------------------------------------------------------------


def learn_styles(
    bank: lb.AdapterBank, model: ImageModel, data: Pictures, objective: Objective, args: argparse.Namespace
) -> dict[str, Any]:
    """Both adapters in the same passes: each row's noise and place come from its adapter's seed, step and row alone."""
    optimizer, seeds = SlotOptimizer(bank), {name: mixed(args.seed, i) for i, name in enumerate(STYLES)}
    for name in STYLES:
        config = lb.AdapterConfig(
            rank=args.rank, alpha=args.rank, targets=["all-linear", "all-conv"], exclude=["unet.conv_in", "unet.conv_out"]
        )
        bank.add(name, config, seed=seeds[name])
        optimizer.add(name, OptimizerConfig(max_grad_norm=1.0))
    compile_image_model(model)  # on a GPU, where passes are captured then
    train = TrainingPass(bank, lambda batch: row_losses(batch, model(batch)), masks=False)
    order = {name: torch.Generator().manual_seed(seeds[name]) for name in STYLES}
    start, losses = time.monotonic(), dict[str, list[float]]()
    mean = {name: torch.zeros((), device=bank.device) for name in STYLES}
    for step in range(args.steps):
        rows = {name: torch.multinomial(data.weights_N, args.batch, replacement=True, generator=order[name]) for name in STYLES}
        batch = joined([style_batch(data, objective, name, rows[name].tolist(), seeds[name], step) for name in STYLES])
        found = train(batch, [name for name in STYLES for _ in range(args.batch)])
        rate = args.rate * learning_rate_factor("cosine", step, args.steps, min(50, args.steps))
        optimizer.step(dict.fromkeys(STYLES, rate), dict.fromkeys(STYLES, float(args.batch)))
        for name, own in zip(STYLES, found.view(len(STYLES), -1).mean(1), strict=True):
            mean[name] = own if step == 0 else mean[name].lerp(own, 0.02)
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            for name in STYLES:
                losses.setdefault(name, []).append(round(float(mean[name]), 5))
            say(f"styles, step {step + 1} of {args.steps}: " + ", ".join(f"{name} {losses[name][-1]:.4f}" for name in STYLES))
    summary = bank.summary()
    parameters = {name: summary.adapters[name].parameters for name in STYLES}
    return {"steps": args.steps, "seconds": time.monotonic() - start, "losses": losses, "parameters": parameters}


def style_batch(data: Pictures, objective: Objective, style: str, rows: Sequence[int], seed: int, step: int) -> dict[str, Tensor]:
    """A style's rows of a pass, on the host."""
    shape = (3, data.size, data.size)
    draws = [draw(shape, mixed(seed, step, place)) for place in range(len(rows))]
    captions = data.text_NLD[rows] * torch.tensor([[[float(each.drop >= DROPPED)]] for each in draws])
    return {
        "clean": data.clean(style, rows),
        "noise": torch.stack([each.noise for each in draws]),
        "condition.text": captions,
        **row_tensors([objective.numbers(each) for each in draws]),
    }


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@torch.no_grad()
def losses_on_held_out(
    bank: lb.AdapterBank, model: ImageModel, data: Pictures, objective: Objective
) -> dict[str, dict[str, float]]:
    """Who → style → mean squared error on the names held out, at the same places and with the same noise for all."""
    found: dict[str, dict[str, float]] = {}
    shape = (3, data.size, data.size)
    for who in ("base", *STYLES):
        found[who] = {}
        for style in (BASE, *STYLES):
            sums: list[Tensor] = []
            for part in range(PARTS):
                draws = [fixed_draw(shape, row=row, part=part, parts=PARTS) for row in range(len(data.held))]
                batch = {
                    "clean": data.clean(style, list(data.held)),
                    "noise": torch.stack([each.noise for each in draws]),
                    "condition.text": data.text_NLD[list(data.held)],
                    **row_tensors([objective.numbers(each) for each in draws]),
                }
                batch = {key: value.to(bank.device) for key, value in batch.items()}
                with bank.route(lb.BASE if who == "base" else who):
                    sums.append(row_losses(batch, model(batch)).mean())
            found[who][style] = round(float(torch.stack(sums).mean()), 5)
    return found


# ---- the pictures ----------------------------------------------------------------------------------------------------


def show(bank: lb.AdapterBank, model: ImageModel, data: Pictures, args: argparse.Namespace) -> dict[str, float]:
    """Two grids: names held out, and names of the training. Returns each column's share of dark pixels on held-out names."""
    config = PictureConfig(steps=args.draw_steps, guidance=args.guidance, height=data.size, width=data.size)
    routes: dict[str, Any] = {"base": lb.BASE, STYLES[0]: STYLES[0], MIX: dict.fromkeys(STYLES, 0.5), STYLES[1]: STYLES[1]}
    known = torch.multinomial(data.weights_N, args.names, generator=torch.Generator().manual_seed(args.seed)).tolist()
    dark: dict[str, float] = {}
    for file, rows in (("grid.png", list(data.held[: args.names])), ("grid-trained.png", known)):
        names = [column for column in routes for _ in rows]
        text = data.text_NLD[rows].repeat(len(routes), 1, 1)
        seeds = [mixed(args.seed, row) for row in rows] * len(routes)  # one noise a name, in all columns
        found = draw_pictures(
            model,
            bank,
            {"text": text},
            {"text": torch.zeros_like(text)},
            [routes[name] for name in names],
            seeds=seeds,
            config=config,
        ).view(len(routes), len(rows), 3, data.size, data.size)
        columns = {f"{name}, real": data.pixels[name][rows].float() / 255 for name in (BASE, *STYLES)}
        shown = {BASE + ", real": columns[f"{BASE}, real"]} | dict(zip(routes, found, strict=True))
        shown |= {f"{name}, real": columns[f"{name}, real"] for name in STYLES}
        grid(shown, [data.captions[row] for row in rows]).save(args.output / file)
        if not dark:
            dark = {name: round(float((each.amax(1) < 0.25).float().mean()), 4) for name, each in shown.items()}
    return dark


if __name__ == "__main__":
    main()
