"""A base model for image classification: any …ForImageClassification of transformers, EfficientNet-Lite0, or one of timm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabank.config.images import ImagesConfig
from lorabank.errors import MissingExtraError, ModelError, first_line
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE, SIZE, efficientnet_lite
from lorabank.models.load import pick_device, pick_dtype
from lorabank.models.load_class import load_class
from lorabank.tasks.images.preprocess import load_processor, plain_processor

if TYPE_CHECKING:
    from torch import nn

Say = Callable[[str], None]
TIMM = "timm:"
"""Begins the name of a model of timm's, as `timm:resnet18.a1_in1k`."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, kw_only=True)
class LoadedImageModel:
    """A base model, and what goes with it."""

    model: nn.Module
    """In eval mode, on its device."""
    processor: Any
    """An image processor of transformers."""
    folder: Path | None
    notes: tuple[str, ...] = ()


def load_image_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> LoadedImageModel:
    """Load `name`: a hub id or folder of transformers', `efficientnet-lite0`, or `timm:NAME`.

    Raises ModelError where it can't be had or classifies no pictures, ConfigError for a wrong dtype or device, MissingExtraError
    where a library is missing.
    """
    lite = name.strip().lower() == EFFICIENTNET_LITE
    if not lite and not name.startswith(TIMM):
        return _transformers(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, say=say)
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    if lite:
        found = LoadedImageModel(model=efficientnet_lite(), processor=plain_processor(ImagesConfig(image_size=SIZE)), folder=None)
    else:
        found = _timm(name)
    found.model.to(device=where, dtype=number).eval()
    return found


def _timm(name: str) -> LoadedImageModel:
    try:
        import timm  # pyright: ignore[reportMissingImports]
        import timm.data  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # a torchvision that doesn't fit its torch raises the latter
        raise MissingExtraError(
            f"model {name!r}: needs timm, and a torchvision that fits your torch: pip install 'lorabank[timm]' ({error})"
        ) from error
    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # unknown names, the hub, damaged files: timm raises many kinds
        raise ModelError(f"model {name!r}: timm can't make it ({first_line(error)}). See timm.list_models().") from error
    said = timm.data.resolve_model_data_config(model)
    known = ImagesConfig(image_size=said["input_size"][1], mean=said["mean"], std=said["std"])
    return LoadedImageModel(model=model, processor=plain_processor(known), folder=None)


def _transformers(name: str, *, dtype: str, device: str, trust_remote_code: bool, say: Say) -> LoadedImageModel:
    from transformers import AutoModelForImageClassification

    notes: list[str] = []

    def processor(name: str, folder: Path) -> Any:
        if any((folder / file).is_file() for file in PROCESSOR_FILES):
            return load_processor(folder)
        size = _size_in(folder)
        notes.append(
            f"no image processor beside the model: pictures become {size} pixels a side, by ImageNet's mean and deviation"
        )
        return plain_processor(ImagesConfig(image_size=size))

    base = load_class(
        name, AutoModelForImageClassification, processor, dtype=dtype, device=device, trust_remote_code=trust_remote_code, say=say
    )
    return LoadedImageModel(model=base.model, processor=base.processor, folder=base.folder, notes=(*base.notes, *notes))


def _size_in(folder: Path) -> int:
    """What a model's configuration says of its pictures; 224 where it says nothing."""
    import json

    size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_size")
    found = size[0] if isinstance(size, list) and size else size
    return found if isinstance(found, int) else SIZE


def own_labels(model: Any) -> tuple[str, ...] | None:
    """The names that a model of transformers has for its labels; None where they are only numbered, and for other models."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    names = cast("Mapping[int, object]", model.config.id2label or {})
    found = tuple(str(names[number]) for number in sorted(names))
    numbered = all(name == f"LABEL_{number}" for number, name in enumerate(found))
    return None if numbered or not found else found
