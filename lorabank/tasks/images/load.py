"""A base model for image classification: any …ForImageClassification of transformers, EfficientNet-Lite0, or one of timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabank.config.images import ImagesConfig
from lorabank.errors import ConfigError, MissingExtraError, ModelError, Setting
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE, HEAD, SIZE, efficientnet_lite
from lorabank.models.folder import check_folder
from lorabank.models.load import _config, _first_line, locate, pick_device, pick_dtype
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.images.preprocess import load_processor, plain_processor

if TYPE_CHECKING:
    import torch
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
    head: str | None
    """Module that gives a number a label, where the model's class doesn't say; see `attach`."""
    labels: tuple[str, ...] | None
    """The names that its own head knows; None where nobody gave it any."""
    notes: tuple[str, ...] = ()


def load_image_model(
    name: str,
    config: ImagesConfig,
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
    where = pick_device(device)
    if dtype in ("fp8", "nf4"):
        raise ConfigError(Setting("base_dtype"), f": {dtype} is for language models. Use fp32, bf16 or fp16 for pictures.")
    number = pick_dtype(dtype, where)
    if name.strip().lower() == EFFICIENTNET_LITE:
        size = config.image_size or SIZE
        found = LoadedImageModel(
            model=efficientnet_lite(),
            processor=plain_processor(replace(config, image_size=size)),
            folder=None,
            head=HEAD,
            labels=None,
        )
    elif name.startswith(TIMM):
        found = _timm(name, config)
    else:
        found = _transformers(name, config, number, trust_remote_code=trust_remote_code, say=say)
    cast("Any", found.model).to(device=where, dtype=number)
    found.model.eval()
    return found


def _timm(name: str, config: ImagesConfig) -> LoadedImageModel:
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
        raise ModelError(f"model {name!r}: timm can't make it ({_first_line(error)}). See timm.list_models().") from error
    said = timm.data.resolve_model_data_config(model)
    known = replace(config, image_size=config.image_size or said["input_size"][1], mean=said["mean"], std=said["std"])
    classifier = model.get_classifier()
    head = next((path for path, module in model.named_modules() if module is classifier), None)
    return LoadedImageModel(model=model, processor=plain_processor(known), folder=None, head=head, labels=None)


def _transformers(name: str, config: ImagesConfig, dtype: torch.dtype, *, trust_remote_code: bool, say: Say) -> LoadedImageModel:
    folder = locate(name, trust_remote_code=trust_remote_code, say=say)
    settings = check_folder(folder)
    notes: list[str] = []
    with quiet_transformers():
        from transformers import AutoModelForImageClassification

        model_config = _config(name, folder, settings, trust_remote_code=trust_remote_code)
        known = type(model_config) in AutoModelForImageClassification._model_mapping
        if not known and "AutoModelForImageClassification" not in settings.get("auto_map", {}):
            raise ModelError(
                f"model {name!r}: a {model_config.model_type} classifies no pictures. Task image-classification needs a model "
                "such as ViT, Swin, ResNet or EfficientNet; models of your own go to lorabank.train(model=…)."
            )
        try:
            loaded = AutoModelForImageClassification.from_pretrained(
                str(folder),
                config=model_config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # a damaged file surfaces as one of a dozen classes of three libraries
            raise ModelError(
                f"model {name!r}: its weights can't be read ({_first_line(error)}). Copy or download it again."
            ) from error
    model, info = cast("tuple[Any, dict[str, Any]]", loaded)
    missing = _check_complete(name, model, info)
    has_processor = any((folder / file).is_file() for file in PROCESSOR_FILES)
    if not has_processor:
        size = config.image_size or _size_in(model_config)
        notes.append(
            f"no image processor beside the model: pictures become {size or 224} pixels a side, with mean {list(config.mean)}"
        )
        processor = plain_processor(replace(config, image_size=size))
    else:
        processor = load_processor(str(folder))
    return LoadedImageModel(
        model=model,
        processor=processor,
        folder=folder,
        head=None,
        labels=None if missing else own_labels(model_config),
        notes=tuple(notes),
    )


def _check_complete(name: str, model: nn.Module, info: dict[str, Any]) -> list[str]:
    """Missing weights of the head, which is made anew. Raises ModelError where others are missing."""
    from lorabank.bank.in_full.heads import head_paths

    heads = tuple(f"{path}." for path in head_paths(model))
    missing: list[str] = sorted(info.get("missing_keys") or ())
    if lost := [key for key in missing if not heads or not key.startswith(heads)]:
        raise ModelError(
            f"model {name!r}: its file lacks {len(lost)} of the weights of {type(model).__name__} ({', '.join(lost[:3])}), and "
            "random ones would take their place. Use a complete checkpoint."
        )
    return missing


def own_labels(config: Any) -> tuple[str, ...] | None:
    """The names in a configuration's id2label; None where they are only numbered."""
    names = config.id2label or {}
    found = tuple(str(names[number]) for number in sorted(names))
    numbered = all(name == f"LABEL_{number}" for number, name in enumerate(found))
    return None if numbered or not found else found


def _size_in(config: Any) -> int | None:
    size = config.to_dict().get("image_size")
    return size if isinstance(size, int) else size[0] if isinstance(size, list | tuple) else None
