"""A preview of pictures reads no weights, and says the same of every family as the whole pipeline does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorabank.errors import ModelError
from lorabank.tasks.diffusion.load import load_image_model
from lorabank.tasks.diffusion.load_preview import load_image_preview
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures
from tests.tasks.diffusion.tiny import FAMILY, pipeline


@pytest.mark.parametrize("name", FAMILY)
def test_what_a_preview_reads_is_the_pipelines(name: str, tmp_path: Path) -> None:
    pipeline(name).save_pretrained(tmp_path)
    whole = load_image_model(str(tmp_path), device="cpu").model
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    read = load_image_preview(str(tmp_path)).model
    assert read.device == torch.device("meta")
    assert (read.multiple, read.scale, read.channels) == (whole.multiple, whole.scale, whole.channels)
    caption = "a cat by the sea"
    assert read.token_counts(caption) == whole.token_counts(caption)
    assert type(read.scheduler) is type(whole.scheduler)


def test_a_pipeline_without_a_configuration_is_named(tmp_path: Path) -> None:
    pipeline("sd").save_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match="the pipeline can't be read"):
        load_image_preview(str(tmp_path))


def test_a_pipeline_without_a_tokenizer_is_named_by_both(tmp_path: Path) -> None:
    pipeline("sd").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    for load in (load_image_preview, load_image_model):
        with pytest.raises(ModelError, match="has no tokenizer: sd needs it"):
            load(str(tmp_path))


def test_stable_diffusion_3_does_without_t5(tmp_path: Path) -> None:
    """As it is often loaded, for T5's size: text_encoder_3 and tokenizer_3 are None."""
    whole = pipeline("sd3")
    parts = whole.components | {"text_encoder_3": None, "tokenizer_3": None}
    pipe = type(whole)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    model = load_image_model(str(tmp_path), device="cpu").model
    assert set(load_image_preview(str(tmp_path)).model.token_counts("a cat")) == {"text_encoder", "text_encoder_2"}
    with torch.no_grad():
        condition, negative = (model.encode(model.tokenize([text])) for text in ("a cat", ""))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    config = PictureConfig(steps=2, guidance=3.0, height=16, width=16)
    found = draw_pictures(model, None, condition, negative, [""], seeds=[0], config=config, noise=noise)
    shape = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    torch.testing.assert_close(found, pipe(["a cat"], latents=noise, **shape).images, rtol=0, atol=2e-5)
