"""A small text-conditioned U-Net trained from nothing on one style; the moving average of its last weights is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from pictures import BASE, Pictures
from torch import Tensor, nn

from lorabank.tasks.diffusion.draws import fixed_draw
from lorabank.tasks.diffusion.objective import Objective, noisy, row_losses, row_tensors

DROPPED = 0.15
"""Share of rows that are trained without their name, for guidance."""
PARTS = 4
"""Looks at each held-out picture in a validation, at as many places of the schedule."""
CHECKS = 20
"""Validations on the way."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How the base is trained."""

    minutes: float
    """After the first step, which compiles."""
    batch: int = 128
    rate: float = 4e-4
    text_noise: float = 0.15
    """Standard deviation added to the names' numbers: 1,500 names are learnt by heart otherwise."""
    moved: float = 0.05
    """At most, of a side; as much bigger or smaller."""
    turned: float = 5.0
    """Degrees at most."""


def denoiser(width: int, text: int, size: int, *, dropout: float = 0.0) -> UNet2DConditionModel:
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
        dropout=dropout,
    )


def pretrain(unet: nn.Module, data: Pictures, objective: Objective, how: Pretraining, say: Any) -> dict[str, Any]:
    """Train all weights for so many minutes, in place; returns what it took and both losses on the way."""
    device = next(unet.parameters()).device
    on_gpu = device.type == "cuda"
    unet.train().requires_grad_(True).to(memory_format=torch.channels_last)
    model: Any = torch.compile(unet, dynamic=False) if on_gpu else unet
    rows = Rows(data, objective, how, device)
    optimizer = torch.optim.AdamW(unet.parameters(), how.rate, weight_decay=0.05, fused=on_gpu)
    average = Average(unet)
    recent, step, losses, held = torch.zeros((), device=device), 0, list[float](), list[float]()
    began = start = time.monotonic()
    while (share := (time.monotonic() - start) / (60 * how.minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = how.rate * min(1.0, (step + 1) / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        batch = rows.draw()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            predicted = model(noisy(batch), batch["time"], encoder_hidden_states=batch["text"], return_dict=False)[0]
        loss = row_losses(batch, predicted).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average.take(step)
        recent = loss.detach() if step == 1 else recent.lerp(loss.detach(), 0.01)
        if step == 1:
            float(recent)  # waits for the device
            start = time.monotonic()
        elif share >= (len(held) + 1) / CHECKS:
            with average.worn():
                held.append(round(held_out_loss(unet, data, objective, BASE), 5))
            losses.append(round(float(recent), 5))
            say(f"pretraining {share:4.0%}, step {step}, loss {losses[-1]:.4f}, on names held out {held[-1]:.4f}")
    average.wear()
    unet.eval().requires_grad_(False)
    facts = {
        "steps": step,
        "batch": how.batch,
        "first_step_s": round(start - began, 1),
        "seconds": round(time.monotonic() - start, 1),
    }
    return facts | {"losses": losses, "held_out": held}


class Rows:
    """Pictures a little moved, turned and resized, their names a little blurred, and noise: all drawn on the device."""

    def __init__(self, data: Pictures, objective: Objective, how: Pretraining, device: torch.device) -> None:
        places = row_tensors([objective.at(t) for t in range(objective.steps)])
        self.how, self.steps, self.device = how, objective.steps, device
        self.table = {key: value.to(device) for key, value in places.items()}
        self.clean, self.text = data.clean(BASE, slice(None)).to(device), data.text_NLD.to(device)
        self.weights = data.weights_N.to(device)

    def draw(self) -> dict[str, Tensor]:
        """A batch of `row_losses`, with `text` (N, L, D) and `time` (N,)."""
        rows = torch.multinomial(self.weights, self.how.batch, replacement=True)
        times = torch.randint(self.steps, (len(rows),), device=self.device)
        batch = {key: value[times] for key, value in self.table.items()} | {"clean": self._varied(self.clean[rows])}
        text = self.text[rows]
        text = text + self.how.text_noise * torch.randn_like(text) * (text != 0)
        batch["text"] = text * (torch.rand(len(rows), 1, 1, device=self.device) >= DROPPED)
        batch["noise"] = torch.randn_like(batch["clean"])
        return batch

    def _varied(self, clean: Tensor) -> Tensor:
        """What comes in from outside is white."""
        count, most = len(clean), math.radians(self.how.turned)
        angle, size = self._uniform(count, most), 1.0 + self._uniform(count, self.how.moved)
        shift = 2 * self._uniform(2 * count, self.how.moved).view(2, count)
        rows = [torch.stack([size * angle.cos(), -size * angle.sin(), shift[0]], 1)]
        rows.append(torch.stack([size * angle.sin(), size * angle.cos(), shift[1]], 1))
        where = F.affine_grid(torch.stack(rows, 1), list(clean.shape), align_corners=False)
        return F.grid_sample(clean - 1.0, where, align_corners=False) + 1.0

    def _uniform(self, count: int, most: float) -> Tensor:
        return (2 * torch.rand(count, device=self.device) - 1) * most


class Average:
    """The weights' moving average."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.mean = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def take(self, step: int) -> None:
        """One step's weights."""
        torch._foreach_lerp_(self.mean, self.weights, 1.0 - min(0.999, step / (step + 10)))

    @torch.no_grad()
    def wear(self) -> None:
        """The model's weights become the average's."""
        torch._foreach_copy_(self.weights, self.mean)

    def worn(self) -> Worn:
        """The model has the average in place of its weights within."""
        return Worn(self)


class Worn:
    """See `Average.worn`."""

    def __init__(self, average: Average) -> None:
        self.average, self.own = average, list[Tensor]()

    @torch.no_grad()
    def __enter__(self) -> None:
        self.own = [p.clone() for p in self.average.weights]
        self.average.wear()

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        torch._foreach_copy_(self.average.weights, self.own)


@torch.no_grad()
def held_out_loss(unet: nn.Module, data: Pictures, objective: Objective, style: str) -> float:
    """Mean squared error on a style's pictures of the names held out, always at the same places with the same noise."""
    device, was_training = next(unet.parameters()).device, unet.training
    unet.eval()
    sums: list[Tensor] = []
    for batch in held_out_batches(data, objective, style):
        on = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = unet(noisy(on), on["time"], encoder_hidden_states=on["condition.text"], return_dict=False)[0]
        sums.append(row_losses(on, predicted).mean())
    unet.train(was_training)
    return float(torch.stack(sums).mean())


def held_out_batches(data: Pictures, objective: Objective, style: str) -> Sequence[dict[str, Tensor]]:
    """All names held out, `PARTS` times, on the host."""
    shape, held, found = (3, data.size, data.size), list(data.held), list[dict[str, Tensor]]()
    for part in range(PARTS):
        draws = [fixed_draw(shape, row=row, part=part, parts=PARTS) for row in range(len(held))]
        found.append(
            {
                "clean": data.clean(style, held),
                "noise": torch.stack([each.noise for each in draws]),
                "condition.text": data.text_NLD[held],
                **row_tensors([objective.numbers(each) for each in draws]),
            }
        )
    return found
