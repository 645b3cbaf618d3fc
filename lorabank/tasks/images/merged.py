"""Classifiers of other libraries than transformers with an adapter in their weights: a folder to write, and to load again.

`model.safetensors` has the names that the model's own library gives its weights, so that this library loads them too;
`classifier.json` says which architecture they are of, the labels, and the layer that gives a number a label.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lorabank.bank.task_class import label_names
from lorabank.config.images import ImagesConfig
from lorabank.errors import LorabankError, ModelError, first_line
from lorabank.formats.adapter import Adapter
from lorabank.merging.merge import check_fingerprint, merge
from lorabank.merging.outputs import LogitsCheck
from lorabank.merging.report import MergeReport
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE, packages_names, unfilled, with_torchs_convolutions
from lorabank.tasks.images.kept import KEPT
from lorabank.tasks.images.preprocess import load_processor, read_off

ABOUT, WEIGHTS = "classifier.json", "model.safetensors"
NOTE = "_lorabank_classifier"
"""Attribute of a merged model that was loaded: what its file says."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What `classifier.json` says."""

    architecture: str
    """`efficientnet-lite0`, or `timm:NAME`."""
    labels: tuple[str, ...] | None
    """None: the architecture's own, unnamed."""
    head: str | None
    """The linear layer whose outputs are these labels; None: as many as the architecture has."""


def merge_classifier(
    model: nn.Module,
    processor: Any,
    name: str,
    adapter: Adapter,
    output: Path,
    *,
    strength: float = 1.0,
    force: bool = False,
) -> tuple[MergeReport, LogitsCheck | None]:
    """Merge `adapter` into `model` and write it into the empty folder `output`; what rounding lost, and outputs compared.

    name: as `load_image_model` had it: `efficientnet-lite0`, `timm:NAME`, or a folder that was written here. The adapter's own
    head takes the place of the model's, whatever number of labels that has. Raises as `merge` does.
    """
    if not force:
        check_fingerprint(model, adapter)  # with the head that it was trained beside
    changed = _fit_head(model, adapter)
    size = read_off(processor, KEPT.merged(ImagesConfig(), {"adapter": adapter}))
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    picture = torch.rand(1, 3, size.height, size.width, generator=generator).to(first.device, first.dtype)
    handle = merge(model, adapter, strength=strength, force=True, inputs=picture, say=None)
    before = vars(model).get(NOTE) or About(architecture=architecture_of(name), labels=None, head=None)
    own = label_names(adapter)  # None without a head of its own
    about = About(
        architecture=before.architecture,
        labels=tuple(own) if own else None if changed is not None else before.labels,
        head=before.head if changed is None else changed,
    )
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    if about.architecture == EFFICIENTNET_LITE:
        tensors = packages_names(model, tensors)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / ABOUT).write_text(json.dumps(asdict(about), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    size.processor.save_pretrained(output)
    return handle.report, handle.logits


def load_merged(folder: Path) -> tuple[nn.Module, Any]:
    """(model, image processor) of a folder that `merge_classifier` wrote. Raises ModelError, MissingExtraError."""
    try:
        about = read_about(folder)
        tensors = load_file(folder / WEIGHTS)
        model = _unfilled(about.architecture)
        if about.head is not None:
            width = len(tensors[f"{about.head}.weight"])
            if about.labels is not None and len(about.labels) != width:
                raise ValueError(f"{len(about.labels)} labels for {width} outputs")
            _set_head(model, about.head, width)
        model.load_state_dict(tensors)
    except LorabankError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {str(folder)!r}: {ABOUT} and {WEIGHTS} don't make a classifier ({first_line(error)}). Copy or merge it again."
        ) from error
    model = with_torchs_convolutions(model) if about.architecture == EFFICIENTNET_LITE else model
    vars(model)[NOTE] = about
    return model, load_processor(folder)


def noted_labels(model: object) -> tuple[str, ...] | None:
    """The names of a merged classifier's labels; None for another model."""
    about = vars(model).get(NOTE)
    return about.labels if isinstance(about, About) else None


def architecture_of(name: str) -> str:
    """A base's name as `classifier.json` has it."""
    return EFFICIENTNET_LITE if name.strip().lower() == EFFICIENTNET_LITE else name


def read_about(folder: Path) -> About:
    """What a folder's `classifier.json` says. Raises OSError, ValueError, KeyError and TypeError."""
    said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    labels = None if said["labels"] is None else tuple(map(str, said["labels"]))
    return About(architecture=str(said["architecture"]), labels=labels, head=said["head"])


def _unfilled(architecture: str) -> nn.Module:
    if architecture == EFFICIENTNET_LITE:
        return unfilled()
    from lorabank.tasks.images.timm_models import TIMM, timm_model

    if not architecture.startswith(TIMM):
        raise ValueError(f"architecture {architecture!r} isn't known")
    return timm_model(architecture, pretrained=False)


def _fit_head(model: nn.Module, adapter: Adapter) -> str | None:
    """Give the model a linear layer of the adapter's size where that has another number of labels; its path."""
    there = dict(model.named_modules())
    for path, values in adapter.modules.items():
        own = there.get(path)  # None: `merge` says that it isn't there
        weight = values.get("weight")
        if isinstance(own, nn.Linear) and weight is not None and weight.ndim == 2 and weight.shape != own.weight.shape:
            _set_head(model, path, len(weight))
            return path
    return None


def _set_head(model: nn.Module, path: str, labels: int) -> None:
    own = model.get_submodule(path)
    if not isinstance(own, nn.Linear):
        raise ValueError(f"{path!r} is a {type(own).__name__}, expected a linear layer")
    made = nn.Linear(own.in_features, labels, device=own.weight.device, dtype=own.weight.dtype)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made.eval().requires_grad_(False))
