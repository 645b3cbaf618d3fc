"""Settings, folders and comparisons that the tests of whole runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lorabank as lb
from tests.tasks.diffusion.tiny import folder_of_pictures

PICTURES: dict[str, Any] = {"resolution": 32, "bucket_step": 8, "min_side": 16, "sample_steps": 2, "sample_prompts": ["a cat"]}
SETTINGS: dict[str, Any] = {
    "task": "text-to-image",
    "rank": 2,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "max_steps": 4,
    "val_split": 0,
    "eval": {"every": 2},
    "save": {"every": 2},
    "diffusion": PICTURES,
}
SIZES = [(80, 80), (120, 80)]


def three_styles(folder: Path) -> dict[str, Path]:
    """Three sets of pictures of two shapes."""
    return {
        name: folder_of_pictures(folder / name, 5 + i, seed=20 * i, sizes=SIZES) for i, name in enumerate(("ink", "oil", "wax"))
    }


def leaves(adapter: lb.Adapter) -> dict[str, torch.Tensor]:
    return {f"{path}.{key}": getattr(layer, key) for path, layer in sorted(adapter.layers.items()) for key in "AB"}


def assert_near(one: lb.Adapter, other: lb.Adapter) -> None:
    mine, others = leaves(one), leaves(other)
    assert mine.keys() == others.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, others[key], atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
