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
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the machine with the GPU may have the folder only

import torch
from base import DROPPED, Pretraining, denoiser, held_out_batches, pretrain
from diffusers import DDIMScheduler
from grid import grid
from pictures import BASE, STYLES, Pictures, pictures_of
from torch import Tensor

import lorabank as lb
from lorabank.engine.own_pass import TrainingPass
from lorabank.formats.diffusers import save_diffusers
from lorabank.optim.schedules import learning_rate_factor
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from lorabank.tasks.diffusion.draws import draw, mixed
from lorabank.tasks.diffusion.families import FAMILIES
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import Objective, objective_of, row_losses, row_tensors
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures
from lorabank.tasks.diffusion.speed import compile_image_model

HERE = Path(__file__).parent
MIX = "mix 50:50"


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
    unet = denoiser(args.width, data.text_NLD.shape[-1], data.size, dropout=0.1).to(device)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in unet.parameters()), "device": device_name(device)}
    if args.base is not None and args.base.exists():
        unet.load_state_dict(torch.load(args.base, map_location=device, weights_only=True))
    else:
        how = Pretraining(minutes=args.minutes, batch=args.pretrain_batch, rate=args.pretrain_rate)
        facts["pretraining"] = pretrain(unet, data, objective_of(scheduler), how, say)
        (args.output / "base.json").write_text(json.dumps(facts, indent=1))
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
    parser.add_argument("--pretrain-batch", type=int, default=128)
    parser.add_argument("--pretrain-rate", type=float, default=4e-4)
    parser.add_argument("--width", type=int, default=128, help="channels of the first level")
    parser.add_argument("--steps", type=int, default=1200, help="of both styles; 0: the base alone")
    parser.add_argument("--batch", type=int, default=64, help="rows of each style in a pass")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the names")
    parser.add_argument("--names", type=int, default=16, help="in the grid")
    parser.add_argument("--draw-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0, help="over pixels, which are clipped, 2 and more change colours")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="the frozen base in bf16; unasked on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.bf16 = args.device.startswith("cuda") if args.bf16 is None else args.bf16
    return args


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
    for who in ("base", *STYLES):
        found[who] = {}
        for style in (BASE, *STYLES):
            sums: list[Tensor] = []
            for batch in held_out_batches(data, objective, style):
                on = {key: value.to(bank.device) for key, value in batch.items()}
                with bank.route(lb.BASE if who == "base" else who):
                    sums.append(row_losses(on, model(on)).mean())
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
