"""Joint training is training alone, of every family and of the text encoders; a stopped run ends as one that wasn't."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import lorabank as lb
from lorabank import api
from lorabank.tasks.diffusion.draws import mixed
from lorabank.tasks.diffusion.sampling import noise_of
from tests.tasks.diffusion.runs import PICTURES, SETTINGS, assert_near, leaves, three_styles
from tests.tasks.diffusion.tiny import PIPELINES, saved
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run

FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in ("sd", "sd2", "sdxl") else ()) for name in PIPELINES]
"""Transformers are quicker than U-Nets."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return three_styles(tmp_path_factory.mktemp("styles"))


@pytest.mark.parametrize("name", FAMILIES)
def test_three_styles_train_jointly_as_they_do_alone(root: Path, styles: dict[str, Path], name: str) -> None:
    """Law 3: noise, places, dropped captions and sizes of each are its own, whoever is beside it."""
    settings = {**SETTINGS, "diffusion": {**PICTURES, "caption_dropout": 0.3, "noise_offset": 0.1}}
    every = {style: {"data": str(path)} for style, path in styles.items()}
    joint = lb.train(model=str(saved(name, root)), adapters=every, **settings)
    for style in ("ink", "wax") if name in ("sd", "flux") else ("oil",):
        alone = lb.train(model=str(saved(name, root)), adapters={style: every[style]}, **settings)
        assert_near(joint.trained[style], alone.trained[style])
        assert any(float(value.abs().max()) > 1e-3 for key, value in leaves(alone.trained[style]).items() if key.endswith("B"))


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(
    root: Path, styles: dict[str, Path], tmp_path: Path
) -> None:
    runs = {"model": str(saved("sd2", root)), "data": str(styles["ink"]), "output": str(tmp_path / "run"), **SETTINGS}
    lb.train(**runs)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(listeners=[SignalAt(("step", 3), signal.SIGINT)], **runs)
    assert halved.interrupted and halved.adapters["default"].steps == 3
    lb.train(resume=True, **runs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("sd", "kohya"), ("sdxl", "kohya"), ("sdxl", "diffusers")])
def test_text_encoders_are_part_of_one_adapter(root: Path, styles: dict[str, Path], tmp_path: Path, name: str, form: str) -> None:
    """Captions are encoded in each pass; one file holds all parts, and a pipeline of diffusers draws with it."""
    diffusion = {**PICTURES, "text_encoders": True, "save_format": form}
    every = {style: {"data": str(styles[style])} for style in ("ink", "oil")}
    settings = {**SETTINGS, "diffusion": diffusion}
    joint = lb.train(model=str(saved(name, root)), output=str(tmp_path / "run"), adapters=every, **settings)
    parts = {path.partition(".")[0] for path in joint.trained["ink"].layers}
    assert parts == {"unet", "text_encoder"} | ({"text_encoder_2"} if name == "sdxl" else set())
    moved = {
        key: float(v.abs().max()) for key, v in leaves(joint.trained["ink"]).items() if "layers.0." in key and key.endswith("B")
    }
    assert len(moved) == 4 * (len(parts) - 1)  # SDXL doesn't read the first encoder's last layer
    assert min(moved.values()) > 1e-4
    if form == "kohya":
        alone = lb.train(model=str(saved(name, root)), adapters={"ink": every["ink"]}, **settings)
        assert_near(joint.trained["ink"], alone.trained["ink"])
    file = tmp_path / "run" / "ink" / ("ink.safetensors" if form == "kohya" else "pytorch_lora_weights.safetensors")
    read = lb.Adapter.load(file)
    for key, value in leaves(joint.trained["ink"]).items():
        torch.testing.assert_close(leaves(read)[key], value)

    api.predict(tmp_path / "run", "", tmp_path / "out", ["ink"], options={"prompt": "a cat", "seed": 3, "size": (16, 16)})
    pipe = DiffusionPipeline.from_pretrained(saved(name, root), **({"safety_checker": None} if name == "sd" else {}))
    pipe.load_lora_weights(str(file))
    pipe.set_progress_bar_config(disable=True)
    loaded = api.load_run(tmp_path / "run", ["ink"])
    noise = noise_of(loaded.model, [mixed(3, 0)], 16, 16)
    if form == "diffusers":  # diffusers takes one scaling for all layers of kohya's text encoders
        expected = pipe("a cat", height=16, width=16, num_inference_steps=2, latents=noise, guidance_scale=7.5, output_type="pt")
        (line,) = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
        found = np.asarray(Image.open(tmp_path / "out" / json.loads(line)["file_name"])).astype(float) / 255
        assert np.abs(found - expected.images[0].permute(1, 2, 0).numpy()).max() < 0.01


def test_recomputation_gives_the_same(root: Path, styles: dict[str, Path]) -> None:
    runs = {"model": str(saved("sd", root)), "data": str(styles["ink"]), **SETTINGS}
    assert_near(lb.train(gradient_checkpointing=True, **runs).trained["default"], lb.train(**runs).trained["default"])
