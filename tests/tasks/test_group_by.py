"""`data.group_by` in the tasks of pictures and sounds: a value's rows stay in one split, and a missing column is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorabank.config.detection import DetectionConfig
from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.images import ImagesConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from lorabank.tasks.detection.prepare import prepare as detect
from lorabank.tasks.diffusion.rows import prepare as draw
from lorabank.tasks.images.prepare import prepare_images
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.rows import PixelStore
from lorabank.tasks.synthesis.rows import Limits
from lorabank.tasks.synthesis.rows import prepare as say
from tests.tasks.detection.made import coco_folder, table_rows
from tests.tasks.diffusion.tiny import picture as smooth
from tests.tasks.images.made import folder as image_folder
from tests.tasks.images.made import picture
from tests.tasks.synthesis.made import spoken_rows, tiny_processor

COUNT, TAKES = 12, 4
"""Rows, and how many values of the column there are."""


def _grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "take": f"t{i % TAKES}"} for i, row in enumerate(rows)]


def _classified(source: Any, data: DataConfig, where: Path) -> Any:
    images = ImagesConfig(image_size=16)
    return prepare_images(data, images, PixelStore(read_off(plain_processor(images), images), 1e9), seed=0, train=source)


def _found(source: Any, data: DataConfig, where: Path) -> Any:
    def keep(digest: str, upright: bool, image: Image.Image) -> None: ...

    return detect(data, DetectionConfig(), seed=0, train=source, val=None, keep=keep)


def _drawn(source: Any, data: DataConfig, where: Path) -> Any:
    config = DiffusionConfig(resolution=32, bucket_step=8, min_side=16)
    return draw(data, config, step=8, seed=0, train=source, val=None)


def _said(source: Any, data: DataConfig, where: Path) -> Any:
    limits = Limits(speaker=4, text=40, reduction=2)
    return say(data, SynthesisConfig(), tiny_processor(where / "spm"), limits, seed=0, train=source, val=None)


Prepare = Callable[[Any, DataConfig, Path], Any]
ROWS: dict[str, tuple[Prepare, Callable[[], list[dict[str, Any]]]]] = {
    "image-classification": (
        _classified,
        lambda: [{"image": picture(("red", "blue")[i % 2], i), "label": ("red", "blue")[i % 2]} for i in range(COUNT)],
    ),
    "object-detection": (_found, lambda: table_rows(COUNT)),
    "text-to-image": (_drawn, lambda: [{"image": smooth(i), "text": f"cat {i}"} for i in range(COUNT)]),
    "text-to-speech": (_said, lambda: spoken_rows(COUNT)),
}


@pytest.mark.parametrize("task", ROWS)
def test_values_stay_together(task: str, tmp_path: Path) -> None:
    prepare, rows = ROWS[task]
    data = DataConfig(group_by="take", val_split=3)
    made = prepare(_grouped(rows()), data, tmp_path)
    train, val = ({row.group for row in part} for part in (made.train, made.val))
    assert len(made.val) == COUNT // TAKES
    assert len(train) == TAKES - 1 and len(val) == 1 and not train & val
    with pytest.raises(DataError, match=r"data\.group_by asks for column 'tkae' \(did you mean 'take'\?\)"):
        prepare(_grouped(rows()), DataConfig(group_by="tkae", val_split=3), tmp_path)


def test_a_coco_files_images_have_the_keys(tmp_path: Path) -> None:
    file = coco_folder(tmp_path / "coco", COUNT)
    content = json.loads(file.read_text())
    content["images"] = _grouped(content["images"])
    file.write_text(json.dumps(content))
    made = _found(str(file), DataConfig(group_by="take", val_split=3), tmp_path)
    assert len({row.group for row in made.val}) == 1
    assert not {row.group for row in made.val} & {row.group for row in made.train}


def test_folders_have_no_columns(tmp_path: Path) -> None:
    pictures = image_folder(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"data\.group_by asks for column 'take'; there are none"):
        _classified(str(pictures), DataConfig(group_by="take"), tmp_path)
    for number in range(3):
        smooth(number).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=r"data\.group_by asks for column 'take'; there are none"):
        _drawn(str(tmp_path), DataConfig(group_by="take"), tmp_path)
