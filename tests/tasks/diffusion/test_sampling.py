"""Pictures against diffusers' own pipelines, of five families; guidance that keeps each row's adapter; mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorabank as lb
from lorabank import BASE
from lorabank.errors import ConfigError
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures, noise_of
from tests.tasks.diffusion.tiny import PIPELINES, model_of, pipeline

CONFIG = PictureConfig(steps=3, guidance=3.0, height=16, width=16)
CAPTIONS = ["a cat", "some dog"]


def conditions(model: ImageModel, captions: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        condition, negative = (model.encode(model.tokenize(texts)) for texts in (captions, [""] * len(captions)))
    if model.zero_empty:
        negative = {name: torch.zeros_like(value) for name, value in negative.items()}
    if model.family.sized:
        condition["sizes"] = negative["sizes"] = model.sizes((16, 16), (0, 0), (16, 16)).expand(len(captions), -1)
    return condition, negative


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_the_pipelines(name: str) -> None:
    pipe = pipeline(name)
    model = model_of(pipe, name)
    noise = torch.randn(2, model.channels, 8, 8, generator=torch.Generator().manual_seed(7))
    more: dict[str, Any] = {"max_sequence_length": 10} if name in ("sd3", "flux") else {}
    latents = noise.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16) if name == "flux" else noise
    expected = pipe(
        CAPTIONS, num_inference_steps=3, guidance_scale=3.0, height=16, width=16, latents=latents, output_type="pt", **more
    ).images
    found = draw_pictures(model, None, *conditions(model, CAPTIONS), ["", ""], seeds=[0, 1], config=CONFIG, noise=noise)
    assert found.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def banked(name: str, *, trained: tuple[str, ...] = ()) -> tuple[ImageModel, lb.AdapterBank]:
    """Two adapters that do something."""
    model = model_of(pipeline(name), name, trained)
    bank = lb.attach(model)
    for seed, adapter in enumerate(("a", "b")):
        bank.add(adapter, lb.AdapterConfig(rank=2 + seed, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"]), seed=seed)
        with torch.no_grad():
            for leaf in bank.parameters(adapter):
                leaf.add_(0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    return model, bank


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_every_row_keeps_its_adapter_under_guidance(name: str) -> None:
    """Guidance runs each row twice: a mixed batch draws what each of its rows draws alone, mixtures and the base too."""
    model, bank = banked(name)
    routes: list[Any] = ["a", BASE, {"a": 0.5, "b": 0.5}, "b"]
    captions = ["a cat", "a cat", "a dog", "a hat"]
    seeds = [1, 1, 2, 3]
    condition, negative = conditions(model, captions)
    together = draw_pictures(model, bank, condition, negative, routes, seeds=seeds, config=CONFIG)
    for i, route in enumerate(routes):
        one, none = ({key: value[i : i + 1] for key, value in each.items()} for each in (condition, negative))
        alone = draw_pictures(model, bank, one, none, [route], seeds=[seeds[i]], config=CONFIG)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=5e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2  # the adapter does something
    bank.detach()
    plain = draw_pictures(model, None, condition, negative, routes, seeds=seeds, config=CONFIG)
    torch.testing.assert_close(together[1], plain[1], rtol=0, atol=1e-5)


def test_noise_is_the_seeds_own() -> None:
    model = model_of(pipeline("sd"), "sd")
    several, one = noise_of(model, [5, 6], 16, 24), noise_of(model, [6], 16, 24)
    assert several.shape == (2, 4, 8, 12)
    assert torch.equal(several[1:], one)


def test_a_size_that_cannot_be_drawn_names_the_nearest() -> None:
    model = model_of(pipeline("sd"), "sd")
    condition, negative = conditions(model, ["a cat"])
    with pytest.raises(ConfigError, match=r"18 × 16.*multiples of 4.*20 × 16|18 × 16.*multiples of 4.*16 × 16"):
        draw_pictures(model, None, condition, negative, [""], seeds=[0], config=PictureConfig(height=16, width=18))


def test_guidance_of_one_draws_once() -> None:
    """The batch isn't doubled: the pictures are those of the condition alone."""
    model = model_of(pipeline("sd"), "sd")
    condition, negative = conditions(model, ["a cat"])
    config = PictureConfig(steps=3, guidance=1.0, height=16, width=16)
    found = draw_pictures(model, None, condition, negative, [""], seeds=[0], config=config)
    plain = draw_pictures(model, None, condition, None, [""], seeds=[0], config=CONFIG)
    assert torch.equal(found, plain)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("kind", ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_other_schedulers_draw_a_row_alone_as_in_a_batch(kind: str) -> None:
    """Those that add noise at each step take it from the row's own seed."""
    import diffusers

    pipe, config = pipeline("sd"), PictureConfig(steps=5, guidance=3.0, height=16, width=16)
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    model = model_of(pipe, "sd")
    condition, negative = conditions(model, ["a cat", "a hat"])
    together = draw_pictures(model, None, condition, negative, ["", ""], seeds=[4, 5], config=config)
    one, none = ({key: value[1:] for key, value in each.items()} for each in (condition, negative))
    alone = draw_pictures(model, None, one, none, [""], seeds=[5], config=config)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    if kind != "EulerAncestralDiscrete":
        noise = noise_of(model, [5], 16, 16)
        expected = pipe("a hat", num_inference_steps=5, guidance_scale=3.0, height=16, width=16, latents=noise, output_type="pt")
        torch.testing.assert_close(alone, expected.images, rtol=0, atol=1e-4)
