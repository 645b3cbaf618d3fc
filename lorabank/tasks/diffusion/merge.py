"""`merge_pipeline`: an adapter into the weights of a diffusers pipeline, as a pipeline's folder of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorabank.errors import MergeError, ModelError, first_line
from lorabank.formats.adapter import Adapter
from lorabank.formats.components import as_component, components
from lorabank.merging.merge import merge
from lorabank.merging.report import MergeReport
from lorabank.merging.shards import WEIGHT_FILES
from lorabank.models.dtypes import stored_in
from lorabank.models.folder import read_json
from lorabank.models.load import pick_device
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.diffusion.families import Family
from lorabank.tasks.diffusion.load import INDEX, Say, family_of, has_class, import_diffusers, no_bars, pipeline_folder
from lorabank.tasks.diffusion.model import ImageModel

_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)[.-]")
"""In the names of weight files that diffusers loads when it is asked for by `variant`: of one file, of shards, of an index."""


def merge_pipeline(
    name: str,
    adapter: Adapter,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    strength: float = 1.0,
    force: bool = False,
    say: Say = lambda line: None,
) -> MergeReport:
    """Write the pipeline `name` (folder or hub id) with `adapter` in its weights into the empty folder `output`.

    Parts that the adapter changes are loaded and saved, in the dtype that their files store, or `dtype`; every other file that
    diffusers loads is copied as it is. Each changed layer's output is compared with base plus adapter.
    Raises ModelError for what is no pipeline of a known family; FingerprintError, MergeError as `merge` does.
    """
    folder = pipeline_folder(name)
    family = family_of(folder, name)
    index = read_json(folder / INDEX, repr(name))
    clips = [part for part in family.encoders if _class_of(index, part)[1].startswith("CLIP")]
    if components(list(adapter.layers)) == [""]:
        adapter = as_component(adapter, family.denoiser)  # trained by another tool on the denoiser alone
    changed = components([*adapter.layers, *adapter.modules, *adapter.biases, *adapter.token_rows])
    if strangers := [part for part in changed if part not in {family.denoiser, *clips}]:
        raise MergeError(
            f"merge: the adapter changes {strangers[0] or 'layers without a part'}, and what is merged of {name!r}, "
            f"{family.name}, is {', '.join([family.denoiser, *clips])}. Draw with the adapter beside the base (lorabank predict)."
        )
    say(f"loading {', '.join(changed)} of {family.name} pipeline {name} …")
    model = _model(folder, name, family, index, clips, dtype)
    nn.Module.to(model, pick_device(device))
    report = merge(model, adapter, strength=strength, force=force, say=None).report
    say(f"writing {output.name} …")
    for part in changed:
        with quiet_transformers():
            model.parts[part].save_pretrained(output / part)
    _copy_rest(folder, output, index, changed)
    return report


def _model(
    folder: Path, name: str, family: Family, index: Mapping[str, Any], clips: Sequence[str], dtype: torch.dtype | None
) -> ImageModel:
    """The parts that adapters may change: all of them, since a fingerprint is of all. Without VAE, tokenizers and T5."""
    parts = {part: _part(folder, name, part, _class_of(index, part), dtype) for part in (family.denoiser, *clips)}
    return ImageModel(family, parts.pop(family.denoiser), scheduler=None, encoders=parts, trained=clips)


def _class_of(index: Mapping[str, Any], part: str) -> tuple[str, str]:
    """(library, class) that a pipeline's index names for a part; two empty words for none."""
    said = index.get(part)
    return (str(said[0]), str(said[1])) if said and has_class(index, part) else ("", "")


def _part(folder: Path, name: str, part: str, kind: tuple[str, str], dtype: torch.dtype | None) -> nn.Module:
    libraries: Mapping[str, Callable[[], Any]] = {"diffusers": import_diffusers, "transformers": lambda: transformers}
    if kind[0] not in libraries:
        raise ModelError(f"model {name!r}: its {INDEX} names no {part} of diffusers or transformers, which is needed")
    number = dtype or stored_in(folder / part) or torch.float32
    try:
        with quiet_transformers(), no_bars(import_diffusers()):
            load: Any = getattr(libraries[kind[0]](), kind[1]).from_pretrained
            made = load(str(folder / part), local_files_only=True, use_safetensors=True, dtype=number)
    except Exception as error:  # a damaged file surfaces as one of a dozen classes of four libraries
        raise ModelError(f"model {name!r}: {part} can't be read ({first_line(error)}). Copy or download it again.") from error
    return made.eval().requires_grad_(False)


def _copy_rest(folder: Path, output: Path, index: Mapping[str, Any], changed: list[str]) -> None:
    """What diffusers loads of a pipeline beside the changed parts, and what lies beside it and holds no weights."""
    parts = [part for part in index if part not in changed and (folder / part).is_dir() and _class_of(index, part)[1]]
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if not path.name.removesuffix(".index.json").endswith(WEIGHT_FILES)]
    for part in parts:
        inside = [path for path in (folder / part).rglob("*") if path.is_file()]
        safe = any(path.suffix == ".safetensors" and not _variant(path) for path in inside)
        kept += [path for path in inside if not safe or _loaded(path)]
    for path in kept:
        target = output / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _variant(path: Path) -> bool:
    return _VARIANT.search(path.name) is not None


def _loaded(path: Path) -> bool:
    """Whether diffusers reads a part's file that has safetensors beside it: not another form of the same weights."""
    weights = path.name.removesuffix(".index.json").endswith(WEIGHT_FILES) or ".index." in path.name
    return not weights or (".safetensors" in path.name and not _variant(path))
