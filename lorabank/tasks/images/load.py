"""A base model for image classification: any …ForImageClassification of transformers, EfficientNet-Lite0, or one of timm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabank.config.images import ImagesConfig
from lorabank.config.paths import expanded
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE, SIZE, efficientnet_lite
from lorabank.models.image_processors import settings_file
from lorabank.models.load import pick_device, pick_dtype
from lorabank.models.load_class import load_class
from lorabank.tasks.images.merged import ABOUT, load_merged, noted_labels
from lorabank.tasks.images.preprocess import load_processor, plain_processor
from lorabank.tasks.images.timm_models import TIMM, import_timm, timm_model

if TYPE_CHECKING:
    from torch import nn

NO_PROCESSOR = (
    "{what}: pictures become images.image_size pixels a side (where that isn't set, what "
    f"its configuration says, else {SIZE}), by images.mean and images.std (ImageNet's)"
)
"""Said where a plain one is made."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LoadedImageModel:
    """A base model, and what goes with it."""

    model: nn.Module
    """In eval mode, on its device."""
    processor: Any
    """An image processor of transformers; None: the model brings none, so the run's settings say it."""
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
    """Load `name`: a hub id or folder of transformers', `efficientnet-lite0`, `timm:NAME`, or one of these merged (a folder).

    Raises ModelError where it can't be had or classifies no pictures, ConfigError for a wrong dtype or device, MissingExtraError
    where a library is missing.
    """
    lite = name.strip().lower() == EFFICIENTNET_LITE
    path = expanded(name, place="model")
    merged = (path / ABOUT).is_file()
    if not lite and not merged and not name.startswith(TIMM):
        return _transformers(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, say=say)
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    if merged:
        model, processor = load_merged(path)
        found = LoadedImageModel(model=model, processor=processor, folder=path)
    elif lite:
        found = LoadedImageModel(model=efficientnet_lite(), processor=plain_processor(ImagesConfig(image_size=SIZE)), folder=None)
    else:
        found = _timm(name)
    found.model.to(device=where, dtype=number).eval()
    return found


def _timm(name: str) -> LoadedImageModel:
    model = timm_model(name, pretrained=True)
    said = import_timm(name).data.resolve_model_data_config(model)
    known = ImagesConfig(image_size=said["input_size"][1], mean=said["mean"], std=said["std"])
    return LoadedImageModel(model=model, processor=plain_processor(known), folder=None)


def _transformers(name: str, *, dtype: str, device: str, trust_remote_code: bool, say: Say) -> LoadedImageModel:
    from transformers import AutoModelForImageClassification

    notes: list[str] = []

    def processor(name: str, folder: Path) -> Any:
        if settings_file(folder) is not None:
            return load_processor(folder)
        notes.append(NO_PROCESSOR.format(what="no image processor beside the model"))
        return None

    base = load_class(
        name, AutoModelForImageClassification, processor, dtype=dtype, device=device, trust_remote_code=trust_remote_code, say=say
    )
    return LoadedImageModel(model=base.model, processor=base.processor, folder=base.folder, notes=(*base.notes, *notes))


def size_of(size: object) -> int:
    """Pixels a side of a configuration's `image_size`; 224 where it says nothing."""
    found = size[0] if isinstance(size, list | tuple) and size else size
    return found if isinstance(found, int) else SIZE


def own_labels(model: Any) -> tuple[str, ...] | None:
    """The names that a model of transformers, or a merged one, has for its labels; None where they are only numbered."""
    from transformers import PreTrainedModel

    if (noted := noted_labels(model)) is not None:
        return noted
    if not isinstance(model, PreTrainedModel):
        return None
    names = cast("Mapping[int, object]", model.config.id2label or {})
    found = tuple(str(names[number]) for number in sorted(names))
    numbered = all(name == f"LABEL_{number}" for number, name in enumerate(found))
    return None if numbered or not found else found
