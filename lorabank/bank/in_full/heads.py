"""The heads of classifiers: modules that transformers makes anew for new labels, beside the body that it loads.

Nothing trained them, so an adapter without a head of its own would learn beneath a random one. PEFT adds heads by task type and
by the names `classifier` and `score`; here the model's class tells them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from lorabank.bank.wrapping import unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import ConfigError, closest

TASKS: Mapping[str, str | None] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForImageClassification": None,
    "ForVideoClassification": None,
    "ForAudioClassification": None,
}
"""End of a classifier's class name → PEFT's task type, which has none for pictures and sounds."""
PEFT_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type → ends of the paths of modules that PEFT then saves in full, and that it asks a file for."""
_NAMES = ("classifier", "score", "projector", "qa_outputs", "classification_head")
"""Heads of a model whose class doesn't name its body."""

DETECTORS: Mapping[str, tuple[str, ...]] = {
    "conditional_detr": ("class_labels_classifier",),
    "deformable_detr": ("class_embed.*",),
    "detr": ("class_labels_classifier",),
    "rt_detr": ("model.enc_score_head", "model.decoder.class_embed.*"),
    "rt_detr_v2": ("model.enc_score_head", "model.decoder.class_embed.*"),
    "table-transformer": ("class_labels_classifier",),
    "yolos": ("class_labels_classifier",),
}
"""Model type → its modules that give a box a number a category, the ones that choose its queries included."""


DENOISING: Mapping[str, str] = dict.fromkeys(("rt_detr", "rt_detr_v2"), "model.denoising_class_embed")
"""Model type → an embedding with a row a category that only training with noised boxes reads, as transformers does it."""


def _ending(model: nn.Module) -> str | None:
    return next((end for end in TASKS if type(model).__name__.endswith(end)), None)


def head_paths(model: nn.Module, declared: str | None = None) -> list[str]:
    """Paths of a classifier's modules with parameters beside its body, in the model's order; none for another model.

    `declared`: the one that `attach` was told of.
    """
    if declared is not None:
        return [declared]
    if _ending(model) is None or not isinstance(model, PreTrainedModel):
        return []
    body = model.base_model_prefix
    known = body in model._modules
    return [
        name
        for name, child in model._modules.items()
        if child is not None
        and (name != body if known else name.endswith(_NAMES))
        and next(unwrapped(child).parameters(), None) is not None
    ]


def check_head(model: nn.Module, path: str) -> str:
    """`path`, the module of one's own model that gives a number a label. Raises ConfigError unless a linear layer is in it."""
    modules = dict(model.named_modules())
    if path not in modules or not path:
        ends = [name for name, module in modules.items() if name and type(unwrapped(module)) is nn.Linear]
        has = f"Its linear layers: {', '.join(ends[-5:]) or 'none'}"
        raise ConfigError(f"head: the model has no module {path!r}{closest(path, [*modules])}. {has}")
    if _last_linear(modules[path], path) is None:
        raise ConfigError(
            f"head: {path!r} is a {type(modules[path]).__name__} without a linear layer (nn.Linear), so it can't be made anew "
            "for other labels. Name the module that gives a number a label."
        )
    return path


def head_parameters(model: nn.Module, declared: str | None = None) -> frozenset[str]:
    """Names of the parameters in those modules, which were never loaded."""
    heads = tuple(f"{path}." for path in head_paths(model, declared) or detector_heads(model))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(heads)) if heads else frozenset()


def label_layer(model: nn.Module, declared: str | None = None) -> str | None:
    """Path of the linear layer in a head that has an output a label; None where there is none such.

    An answer's start and end aren't labels: their number is the model's code's. Of a head that was declared it is the last one.
    """
    if declared is not None:
        return _last_linear(model.get_submodule(declared), declared)
    if _ending(model) == "ForQuestionAnswering":
        return None
    count = getattr(model.config, "num_labels", None) if isinstance(model, PreTrainedModel) else None
    found = None
    for path in head_paths(model):
        for name, module in unwrapped(model.get_submodule(path)).named_modules():
            layer = unwrapped(module)
            if type(layer) is nn.Linear and layer.out_features == count:
                found = f"{path}.{name}".rstrip(".")
    return found


def _last_linear(head: nn.Module, path: str) -> str | None:
    names = [name for name, module in unwrapped(head).named_modules() if type(unwrapped(module)) is nn.Linear]
    return f"{path}.{names[-1]}".rstrip(".") if names else None


def detector_heads(model: nn.Module) -> list[str]:
    """Paths of a detector's modules that give a number a category; none for another model, or one that isn't known.

    They are as the model has them, unless an adapter is added with `num_labels`.
    """
    if not isinstance(model, PreTrainedModel) or not type(model).__name__.endswith("ForObjectDetection"):
        return []
    known = DETECTORS.get(model.config.model_type, ())
    if getattr(model.config, "two_stage", False):
        return []  # Deformable DETR's proposals would come from other categories' heads
    paths = [path for path, _ in model.named_modules()]
    return [path for path in paths if any(fnmatchcase(path, name) and path.count(".") == name.count(".") for name in known)]


def extra_outputs(model: nn.Module) -> int:
    """How many more outputs a head has than labels: 1 for a detector that says "no object" by one of them, else 0."""
    layers = [unwrapped(model.get_submodule(path)) for path in label_layers(model)] if detector_heads(model) else []
    count = int(model.config.num_labels or 0) if isinstance(model, PreTrainedModel) else 0
    return max((layer.out_features - count for layer in layers if isinstance(layer, nn.Linear)), default=0)


def label_layers(model: nn.Module, declared: str | None = None) -> list[str]:
    """Paths of all linear layers with an output a label: a classifier's one (see `label_layer`), or each of a detector's."""
    found = []
    for path in detector_heads(model):
        linear = [name for name, m in unwrapped(model.get_submodule(path)).named_modules() if type(unwrapped(m)) is nn.Linear]
        found += [f"{path}.{linear[-1]}".rstrip(".")] if linear else []
    one = label_layer(model, declared)
    return found or ([one] if one is not None else [])


def with_head(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The configuration, with a detector's head among what it trains in full: it is made anew then, as a classifier's is."""
    heads = detector_heads(model)
    saved = tuple(config.modules_to_save or ())
    return replace(config, modules_to_save=(*saved, *(path for path in heads if path not in saved))) if heads else config


def peft_task(model: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's task type for an adapter that saves these modules; None where PEFT would ask the file for others, too."""
    ending = _ending(model)
    task = None if ending is None else TASKS[ending]
    if task is None:
        return None
    asked = [path for path, _ in model.named_modules() if path.endswith(PEFT_HEADS[task])]
    return task if asked and all(path in saved for path in asked) else None
