"""LoRA on Stable Diffusion 1.5's U-Net: diffusers' example loop beside ours, one style and eight.

    python benchmarks/text_to_image.py --output out/text-to-image.json        # on a GPU, about 5 minutes
    python benchmarks/text_to_image.py --tiny                                 # anywhere: that it runs and computes the same

Both train rank 16 on the attention of the same random weights in bf16, on cached latents of 512² pictures (64 × 64) and cached
text, with AdamW and clipping. The peer is the loop of diffusers' `train_text_to_image_lora.py`: PEFT's layers by
`unet.add_adapter`, torch's AdamW, autocast as accelerate sets it; its adapter is in bf16, as that script leaves it, and in fp32
(`cast_training_params`), as ours is. Noise and timesteps are drawn on the GPU there; ours come from the host, row by row, as in
training. Eight styles: eight of the peer's steps with one picture each, against one of our passes with eight adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine with the GPU may have the folder only

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from gpu_results import commit, versions
from torch import Tensor, nn

import lorabank as lb
from lorabank.engine.own_pass import TrainingPass
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from lorabank.tasks.diffusion.draws import RowDraw, draw, mixed
from lorabank.tasks.diffusion.families import FAMILIES
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import objective_of, row_losses, row_tensors
from lorabank.tasks.diffusion.speed import compile_image_model

RANK, RATE = 16, 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STYLES = tuple(f"style{i}" for i in range(8))
WARM_UP = 5
"""Steps before the first timed one: a pass is captured as a CUDA graph at its third."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained on."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    @property
    def latents(self) -> tuple[int, int, int]:
        return (4, 8, 8) if self.tiny else (4, 64, 64)

    @property
    def text(self) -> tuple[int, int]:
        return (8, 32) if self.tiny else (77, 768)

    def unet(self) -> UNet2DConditionModel:
        """Stable Diffusion 1.5's, with random weights."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
        if self.tiny:
            sizes = {
                "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": (32, 64),
                "norm_num_groups": 8, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            }  # fmt: skip
        with torch.device(self.device):
            made = UNet2DConditionModel(in_channels=4, out_channels=4, **sizes)
        nn.Module.to(made, self.dtype)
        return made

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Cached latents and text, on the host."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, *self.latents, generator=generator), torch.randn(count, *self.text, generator=generator)


Step = Callable[[int], Tensor]
"""Number of a step → its loss on the device."""


# ---- the peer --------------------------------------------------------------------------------------------------------


class Peer:
    """diffusers' example loop."""

    def __init__(self, work: Work, rows: int, *, fp32: bool) -> None:
        from peft import LoraConfig

        self.work, self.unet = work, work.unet().requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
        if fp32:
            cast_training_params(self.unet, dtype=torch.float32)
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.latents, self.text = (each.to(work.device, work.dtype) for each in work.rows(rows))
        self.unet.train()

    def loss(self, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error of one pass."""
        noisy = self.scheduler.add_noise(self.latents, noise, times)
        with torch.autocast(self.work.device.type, self.work.dtype, enabled=self.work.dtype != torch.float32):
            predicted = self.unet(noisy, times, encoder_hidden_states=self.text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise.float(), reduction="mean")

    def __call__(self, step: int) -> Tensor:
        noise = torch.randn_like(self.latents)
        times = torch.randint(0, 1000, (len(noise),), device=noise.device).long()
        loss = self.loss(noise, times)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


# ---- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """One pass for all styles, one picture or more of each."""

    def __init__(self, work: Work, styles: Sequence[str], rows: int, *, how: str = "all", cudnn: bool = True) -> None:
        """`rows`: of each style. `how`: `plain`, `blocks` (transformer blocks compiled), `convolutions` too, or `all`
        (these in channels-last order). `cudnn`: whether torch may choose cuDNN's attention, as the peer's may."""
        if not cudnn:
            torch._dynamo.reset()  # which attention was chosen is in compiled code
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.work, self.styles, self.count = work, styles, rows
        self.model = ImageModel(FAMILIES["sd"], work.unet(), scheduler=scheduler)
        self.bank = lb.attach(self.model)
        self.optimizer = SlotOptimizer(self.bank)
        for i, name in enumerate(styles):
            self.bank.add(name, lb.AdapterConfig(rank=RANK, alpha=RANK, targets=TARGETS), seed=i)
            self.optimizer.add(name, OptimizerConfig(weight_decay=1e-2, max_grad_norm=1.0))
        if how != "plain":
            compile_image_model(self.model, convolutions=how != "blocks", channels_last=how == "all")
        self.train = TrainingPass(
            self.bank, lambda batch: row_losses(batch, self.model(batch)), cuda_graphs=how != "plain", masks=not cudnn
        )
        self.objective = objective_of(scheduler)
        self.latents, self.text = work.rows(rows * len(styles))
        self.routes = [name for name in styles for _ in range(rows)]

    def batch(self, draws: Sequence[RowDraw]) -> dict[str, Tensor]:
        """Rows on the host."""
        noise = torch.stack([each.noise for each in draws])
        numbers = row_tensors([self.objective.numbers(each) for each in draws])
        return {"clean": self.latents, "noise": noise, "condition.text": self.text, **numbers}

    def draws(self, step: int) -> list[RowDraw]:
        seeds = [mixed(i, step, row) for i in range(len(self.styles)) for row in range(self.count)]
        return [draw(self.work.latents, seed) for seed in seeds]

    def __call__(self, step: int) -> Tensor:
        losses = self.train(self.batch(self.draws(step)), self.routes)
        self.optimizer.step(dict.fromkeys(self.styles, RATE), dict.fromkeys(self.styles, float(self.count)))
        return losses.mean()


# ---- measuring -------------------------------------------------------------------------------------------------------


def timed(step: Step, work: Work, rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step, the median and the range of rounds, and the peak of memory."""
    began, on_gpu = time.monotonic(), work.device.type == "cuda"
    if on_gpu:  # before the warm-up: what a graph keeps is allocated as it is captured
        torch.cuda.reset_peak_memory_stats()
    for i in range(WARM_UP):
        step(i)
    synchronize(work)
    warm = time.monotonic() - began
    found: list[float] = []
    loss = torch.zeros(())
    for r in range(rounds):
        start = time.perf_counter()
        for i in range(steps):
            loss = step(WARM_UP + r * steps + i)
        synchronize(work)
        found.append(1000 * (time.perf_counter() - start) / steps)
    if not math.isfinite(float(loss)):
        raise RuntimeError(f"the loss is {float(loss)}: nothing that was timed counts")
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    return {
        "ms": round(statistics.median(found), 2), "range": [round(min(found), 2), round(max(found), 2)],
        "warm_up_s": round(warm, 1), "peak_gib": None if peak is None else round(peak, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if on_gpu else None,
    }  # fmt: skip


def synchronize(work: Work) -> None:
    if work.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check(work: Work) -> dict[str, float]:
    """Loss and gradients of both with the same adapter on the same noise: relative differences, and those of the peer to itself
    in fp32, which is what the dtype's rounding makes."""
    how = "all" if work.device.type == "cuda" else "plain"
    ours = Ours(work, STYLES[:1], 2, how=how)
    for index, p in enumerate(ours.bank.parameters(STYLES[0])):
        with torch.no_grad():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)).to(p))
    draws = ours.draws(3)
    losses = [ours.train(ours.batch(draws), ours.routes).mean() for _ in range(4)]  # the last from a graph
    adapter = ours.bank.adapter(STYLES[0])
    mine = {name: p.grad for name, p in ours.bank.named_parameters(STYLES[0]) if p.grad is not None}
    found, both = {"loss": float(losses[-1])}, dict[str, Tensor]()
    for name, exact in (("peer", False), ("exact", True)):
        peer = Peer(Work(device=work.device, dtype=torch.float32, tiny=work.tiny) if exact else work, 2, fp32=True)
        own = dict(peer.unet.named_parameters())
        with torch.no_grad():
            for path, layer in adapter.layers.items():
                inside = path.removeprefix("unet.")
                own[f"{inside}.lora_A.default.weight"].copy_(layer.A)
                own[f"{inside}.lora_B.default.weight"].copy_(layer.B)
        noise = torch.stack([each.noise for each in draws]).to(work.device)
        times = torch.tensor([min(int(each.place * 1000), 999) for each in draws], device=work.device)
        loss = peer.loss(noise, times)
        loss.backward()
        keys = [f"{path.removeprefix('unet.')}.lora_B.default.weight" for path in adapter.layers]
        gradients = torch.cat([g.float().flatten() for key in keys if (g := own[key].grad) is not None])
        found |= {f"{name}_loss": float(loss.detach())}
        found[f"{name}_gradient"] = float(gradients.norm())
        both[name] = gradients
        del peer
    exactly = both["exact"]
    ours_B = torch.cat([_gradient_of(mine, path).float().flatten() for path in adapter.layers])
    found["our_gradient_error"] = float((ours_B / (4 * 2) - exactly).norm() / exactly.norm())  # four passes of two rows pile up
    found["peers_gradient_error"] = float((both["peer"] - exactly).norm() / exactly.norm())
    return found


def _gradient_of(mine: Mapping[str, Tensor], path: str) -> Tensor:
    """B's gradient as files have it, (out, r)."""
    (key,) = [name for name in mine if name.startswith(path) and name.endswith("B")]
    return mine[key].t()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--variants", action="store_true", help="what each of our choices brings")
    parser.add_argument("--only", nargs="*", help="names of rows")
    args = parser.parse_args()
    device = torch.device(args.device)
    work = Work(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, tiny=args.tiny)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"device": name, "commit": commit(), "versions": versions(), "rows": {}}
    jobs: dict[str, Callable[[], tuple[Step, int]]] = {
        "peer, batch 4, bf16 adapter": lambda: (Peer(work, 4, fp32=False), 4),
        "peer, batch 4, fp32 adapter": lambda: (Peer(work, 4, fp32=True), 4),
        "ours, batch 4": lambda: (Ours(work, STYLES[:1], 4), 4),
        "peer, batch 1, bf16 adapter": lambda: (Peer(work, 1, fp32=False), 1),
        "peer, batch 1, fp32 adapter": lambda: (Peer(work, 1, fp32=True), 1),
        "ours, eight styles at batch 1": lambda: (Ours(work, STYLES, 1), 8),
        "ours, batch 1": lambda: (Ours(work, STYLES[:1], 1), 1),
    }
    variants: dict[str, Callable[[], tuple[Step, int]]] = {
        "ours, batch 4, without cuDNN's attention": lambda: (Ours(work, STYLES[:1], 4, cudnn=False), 4),
        "ours, batch 4, no channels last": lambda: (Ours(work, STYLES[:1], 4, how="convolutions"), 4),
        "ours, batch 4, transformer blocks alone": lambda: (Ours(work, STYLES[:1], 4, how="blocks"), 4),
        "ours, batch 4, kernel by kernel": lambda: (Ours(work, STYLES[:1], 4, how="plain"), 4),
    }
    jobs |= variants if args.variants or args.only else {}
    if not args.only or "check" in args.only:
        guarded(result, "check", lambda: check(work), args.output)
    for job, make in jobs.items():
        if args.only and job not in args.only:
            continue

        def measure(make: Callable[[], tuple[Step, int]] = make) -> dict[str, Any]:
            step, pictures = make()
            row = timed(step, work, args.rounds, args.steps)
            graphs = step.train.graphs if isinstance(step, Ours) else None
            more = {} if graphs is None else {"graphs": len(graphs._captured), "refused": graphs.refused}
            return row | {"pictures_per_s": round(1000 * pictures / row["ms"], 2)} | more

        guarded(result["rows"], job, measure, None)
        free()
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1))
    told(result["rows"])


def guarded(into: dict[str, Any], name: str, compute: Callable[[], Any], output: Path | None) -> None:
    """One row; what fails is said, and the others are measured all the same."""
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            into[name] = compute()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            into[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    said = sorted({str(w.message)[:300] for w in caught if "lorabank" in str(w.filename) or "compile" in str(w.message)})
    print(f"{time.monotonic() - began:6.1f} s  {name}: {json.dumps(into[name])}", flush=True)
    for text in said:
        print(f"          {text}", flush=True)
    free()


def told(rows: Mapping[str, Any]) -> None:
    """The two ratios that were asked for."""

    def ms(name: str) -> float | None:
        return rows.get(name, {}).get("ms")

    for dtype in ("bf16", "fp32"):
        peer, ours = ms(f"peer, batch 4, {dtype} adapter"), ms("ours, batch 4")
        if peer and ours:
            print(f"batch 4, peer's adapter in {dtype}: {peer / ours:.2f} × as fast")
        alone, together = ms(f"peer, batch 1, {dtype} adapter"), ms("ours, eight styles at batch 1")
        if alone and together:
            print(f"eight styles at batch 1, peer's adapter in {dtype}: {8 * alone / together:.2f} × as fast")


if __name__ == "__main__":
    main()
