"""A pipeline's folder, or hub id, as an `ImageModel`. Needs diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabank.config.paths import expanded
from lorabank.errors import ConfigError, MissingExtraError, ModelError, closest, first_line
from lorabank.models.dtypes import dtype_notes
from lorabank.models.folder import read_json
from lorabank.models.load import pick_device, pick_dtype
from lorabank.models.names import closest_sibling
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.diffusion.families import FAMILIES, Family
from lorabank.tasks.diffusion.model import ImageModel

Say = Callable[[str], None]
INDEX = "model_index.json"
PIPELINES: Mapping[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
"""diffusers' class, as a folder's model_index.json has it → family."""


@dataclass(frozen=True, kw_only=True)
class LoadedImageModel:
    """A pipeline's models, ready."""

    model: ImageModel
    """In eval mode, on its device; its VAE in fp32."""
    folder: Path | None
    """None: from the hub's cache."""
    notes: tuple[str, ...]


def load_image_model(name: str, *, dtype: str = "auto", device: str = "auto", say: Say = lambda line: None) -> LoadedImageModel:
    """Load a pipeline. `dtype`: of the denoiser and the text encoders; `auto` is bf16 on a GPU, fp32 on a CPU.

    Raises ModelError for what is no pipeline of a known family, or whose files are incomplete; MissingExtraError.
    """
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    diffusers = import_diffusers()
    folder = pipeline_folder(name)
    family = family_of(folder, name)
    check_index(family, read_json(folder / INDEX, repr(name)))
    say(f"loading {family.name} pipeline {name} …")
    pipe = _pipeline(diffusers, folder, name)
    model = of_pipeline(pipe, family)
    place(model, where, number)
    return LoadedImageModel(model=model, folder=folder, notes=tuple(dtype_notes(dtype, number, where)))


def pipeline_folder(name: str) -> Path:
    """The folder, or a hub id's snapshot. Raises ModelError, MissingExtraError."""
    path = expanded(name, place="model")
    return path if path.is_dir() else _fetched(import_diffusers(), name)


def family_of(folder: Path, name: str) -> Family:
    """By the pipeline's class. Raises ModelError, which says what the folder is instead."""
    if not (folder / INDEX).is_file():
        inside = next((p.parent for p in sorted(folder.glob(f"*/{INDEX}"))), None)
        hint = f" {str(inside)!r} is one: name that." if inside is not None else ""
        one = " It is a single model in transformers' or diffusers' form." if (folder / "config.json").is_file() else ""
        raise ModelError(
            f"model {name!r}: no {INDEX} there, so it is no pipeline of diffusers.{one}{hint} A single .safetensors checkpoint "
            "is converted by diffusers: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)."
        )
    kind = str(read_json(folder / INDEX, repr(name)).get("_class_name"))
    if kind not in PIPELINES:
        raise ModelError(
            f"model {name!r}: a {kind}, which can't be trained here{closest(kind, PIPELINES)}. Known: {', '.join(PIPELINES)}."
        )
    return FAMILIES[PIPELINES[kind]]


def of_pipeline(pipe: Any, family: Family) -> ImageModel:
    """The models of a pipeline of diffusers, which keeps them."""
    encoders = {name: getattr(pipe, name, None) for name in family.encoders}
    tokenizers = {name: getattr(pipe, tokenizer_of(name), None) for name in family.encoders}
    check_parts(family, {**encoders, **{tokenizer_of(name): value for name, value in tokenizers.items()}})
    return ImageModel(
        family,
        getattr(pipe, family.denoiser),
        scheduler=pipe.scheduler,
        encoders={name: model for name, model in encoders.items() if model is not None},
        tokenizers={name: each for name, each in tokenizers.items() if each is not None},
        trained=[name for name, model in encoders.items() if type(model).__name__.startswith("CLIP")],
        vae=pipe.vae,
        zero_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
    )


def of_object(model: object) -> ImageModel:
    """A pipeline of diffusers, or what was made of one. Raises ConfigError for anything else."""
    if isinstance(model, ImageModel):
        return model
    kind = type(model).__name__
    if kind not in PIPELINES:
        raise ConfigError(f"model: text-to-image expects a pipeline of diffusers ({', '.join(PIPELINES)}), got {kind}.")
    return of_pipeline(model, FAMILIES[PIPELINES[kind]])


def tokenizer_of(encoder: str) -> str:
    """diffusers' name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def check_parts(family: Family, parts: Mapping[str, object]) -> None:
    """Raise ModelError where a pipeline lacks a text encoder or tokenizer. T5 may be missing: SD 3 is drawn without it too."""
    missing = [name for name, part in parts.items() if part is None and not name.endswith("_3")]
    if parts.get("text_encoder_3") is not None and parts.get("tokenizer_3") is None:
        missing.append("tokenizer_3")
    if missing:
        raise ModelError(f"the pipeline has no {missing[0]}: {family.name} needs it. Load the whole pipeline.")


def check_index(family: Family, index: Mapping[str, Any]) -> None:
    """The same of what a pipeline's model_index.json names, before anything is loaded."""
    wanted = [*family.encoders, *map(tokenizer_of, family.encoders)]
    check_parts(family, {part: True if has_class(index, part) else None for part in wanted})


def has_class(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline's index names a class for a part; those that are left out are [null, null] there."""
    said = index.get(part)
    return isinstance(said, list) and len(said) == 2 and bool(said[1])


def place(model: ImageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Move all parts to a device, in evaluation mode; the VAE stays in fp32, since SDXL's overflows in half precision."""
    for part in model.parts.values():
        nn.Module.to(part, device, dtype)
        part.eval().requires_grad_(False)
    if model.vae is not None:
        nn.Module.to(model.vae, device, torch.float32)
        model.vae.eval().requires_grad_(False)


def import_diffusers() -> Any:
    """The library. Raises MissingExtraError where it isn't there."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("text-to-image: needs diffusers: pip install 'lorabank[diffusion]'") from error
    return diffusers


def _fetched(diffusers: Any, name: str) -> Path:
    """The snapshot of a hub id."""
    try:
        return Path(diffusers.DiffusionPipeline.download(name))
    except Exception as error:  # the hub client's errors have another class in each of its major versions
        raise unfetched(name, error) from error


def unfetched(name: str, error: Exception) -> ModelError:
    """What is said of a hub id that can't be had."""
    hint = closest_sibling(expanded(name, place="model"))
    return ModelError(
        f"model {name!r}: no such folder here{hint}, and it can't be had from the hub ({first_line(error)}). Name a folder that "
        "pipeline.save_pretrained wrote, or check the spelling of owner and model."
    )


@contextmanager
def no_bars(diffusers: Any) -> Iterator[None]:
    """diffusers without its progress bars, for a stretch of code."""
    log = diffusers.utils.logging
    on = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            log.enable_progress_bar()


def _pipeline(diffusers: Any, folder: Path, name: str) -> Any:
    index = read_json(folder / INDEX, repr(name))
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    left_out = {part: None for part in index if part in unused or index[part] == [None, None]}  # diffusers wants these said
    more = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    try:
        with quiet_transformers(), no_bars(diffusers):
            kind = getattr(diffusers, str(index["_class_name"]))  # imports what notices of torchvision come from
            return kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **left_out, **more)
    except Exception as error:  # a damaged file surfaces as one of a dozen classes of four libraries
        reason = first_line(error)
        raise ModelError(f"model {name!r}: the pipeline can't be read ({reason}). Copy or download it again.") from error
