"""Pictures from captions: one loop for all families, in which every row has a route of its own.

Classifier-free guidance runs each row twice, without its caption and with it: the batch is tiled, and the route with it, so a row
keeps its adapter (or its mixture) in both halves.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.config.checks import check_non_negative, check_positive_int
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import ConfigError
from lorabank.tasks.diffusion.draws import mixed
from lorabank.tasks.diffusion.families import Condition
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.speed import as_it_is

Busy = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How pictures are drawn."""

    steps: int = 30
    """Of the scheduler."""
    guidance: float = 7.5
    """Classifier-free guidance; 1 and below: none. Of a distilled model (Flux): the number that it is told."""
    height: int = 512
    width: int = 512
    """Pixels."""

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width"):
            check_positive_int(name, getattr(self, name))
        check_non_negative("guidance", self.guidance)


def noise_of(model: ImageModel, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """The first latents of rows (N, C, h, w), fp32 on the host: a row's from its own seed, whatever batch it is in."""
    shape = model.channels, height // model.scale, width // model.scale
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(mixed(seed))) for seed in seeds])


@torch.no_grad()
def draw_pictures(
    model: ImageModel,
    bank: AdapterBank | None,
    condition: Condition,
    negative: Condition | None,
    routes: Sequence[RowRoute],
    *,
    seeds: Sequence[int],
    config: PictureConfig,
    noise: Tensor | None = None,
    busy: Busy | None = None,
) -> Tensor:
    """Pictures in [0, 1], fp32 (N, 3, height, width) on the host.

    `condition`, `negative`: of the captions and of what guidance leads away from, one entry a row. `routes`: one a row; a
    mixture too. `seeds`: of each row's noise (`noise` in their place). Raises ConfigError for a size that the model can't draw.
    """
    check_size(model, config.height, config.width)
    rows = len(routes)
    guided = config.guidance > 1.0 and negative is not None and not model.family.distilled
    condition = _on(model, condition)
    if model.family.distilled:
        condition["guidance"] = torch.full((rows,), config.guidance, device=model.device)
    if guided and negative is not None:
        negative = _on(model, negative)
        condition = {name: torch.cat([negative[name], value]) for name, value in condition.items()}
    x = (noise_of(model, seeds, config.height, config.width) if noise is None else noise).to(model.device)
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    times = _timesteps(model, scheduler, config.steps, x)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    generators = [torch.Generator(model.device).manual_seed(mixed(seed, 1)) for seed in seeds]
    takes = inspect.signature(scheduler.step).parameters
    more: dict[str, Any] = {"generator": generators if rows > 1 else generators[0]} if "generator" in takes and seeds else {}
    with evaluation_mode(model.modules()), as_it_is(model.denoiser), _routed(bank, routes, 2 if guided else 1):
        for done, time in enumerate(times):
            seen = torch.cat([x, x]) if guided else x
            if "scale_model_input" in dir(scheduler):
                seen = scheduler.scale_model_input(seen, time)
            found = model.denoise(seen, time.to(x.device).expand(len(seen)), condition).float()
            if guided:
                without, with_caption = found.chunk(2)
                found = without + config.guidance * (with_caption - without)
            x = scheduler.step(found, time, x, return_dict=False, **more)[0]
            if busy is not None:
                busy("drawing pictures", done + 1, len(times))
    return model.pictures(x)


def check_size(model: ImageModel, height: int, width: int) -> None:
    """Raise ConfigError for sides that aren't whole latents at every level of the model."""
    if height % model.multiple or width % model.multiple:
        raise ConfigError(
            f"picture size {width} × {height}: both sides must be multiples of {model.multiple} for this model. "
            f"The nearest is {_nearest(width, model.multiple)} × {_nearest(height, model.multiple)}."
        )


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _on(model: ImageModel, condition: Condition) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in condition.items()}


@contextlib.contextmanager
def _routed(bank: AdapterBank | None, routes: Sequence[RowRoute], times: int) -> Iterator[None]:
    if bank is None:
        yield
        return
    with bank.route(list(routes), repeat=("tile", times)) if times > 1 else bank.route(list(routes)):
        yield


def _timesteps(model: ImageModel, scheduler: Any, steps: int, x: Tensor) -> Tensor:
    """The scheduler's times, its shift by the picture's size where it has one (arXiv:2403.03206, section 5.3.2)."""
    takes = inspect.signature(scheduler.set_timesteps).parameters
    more: dict[str, Any] = {}
    if model.family.distilled and "sigmas" in takes:
        more["sigmas"] = torch.linspace(1.0, 1.0 / steps, steps).tolist()
    if scheduler.config.get("use_dynamic_shifting"):
        config = scheduler.config
        tokens = x.shape[-2] * x.shape[-1] // 4
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        more["mu"] = base + (most - base) * (tokens - low) / (high - low)
    scheduler.set_timesteps(device=x.device, **({"num_inference_steps": steps} | more))
    return scheduler.timesteps
