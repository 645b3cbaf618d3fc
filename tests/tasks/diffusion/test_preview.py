"""A preview of pictures reads no weights, and says the same of every family as the whole pipeline does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorabank.errors import ModelError
from lorabank.tasks.diffusion.load import load_image_model
from lorabank.tasks.diffusion.load_preview import load_image_preview
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
