"""Which class of transformers an adapter was trained on: what its task type says, or the base's own configuration.

A base is often saved as another class than the adapter's: BERT with its masked head, Llama as a language model. Then the task
type, PEFT's `auto_mapping` and the modules that the adapter has decide, and its head says how many labels there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    PreTrainedModel,
)

from lorabank.bank.in_full.heads import extra_outputs, label_layers
from lorabank.bank.parts import part_names
from lorabank.errors import ModelError
from lorabank.formats.adapter import Adapter
from lorabank.formats.labels import label_names

BY_TASK: Mapping[str, tuple[Any, ...]] = {
    "SEQ_CLS": (AutoModelForSequenceClassification,),
    "TOKEN_CLS": (AutoModelForTokenClassification,),
    "QUESTION_ANS": (AutoModelForQuestionAnswering,),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq),
    "CAUSAL_LM": (AutoModelForCausalLM,),
    "FEATURE_EXTRACTION": (AutoModel,),
}
"""PEFT's task type → the automatic classes that it stands for."""
CLASSIFIERS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForImageClassification,
    AutoModelForAudioClassification,
    AutoModelForVideoClassification,
)
"""Those that a base's configuration often doesn't name, since their head is made anew."""
AUTO = (
    AutoModelForCausalLM,
    *CLASSIFIERS,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForMaskedLM,
    AutoModel,
)
"""All that a class may be loaded by, the likeliest first."""
VOCABULARY = "vocab_size"
PROBLEMS = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
"""Kind of labels, as text classification saves it → transformers' `problem_type`."""
ANY_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types that models of other classes have as well, such as those that read pictures: the configuration's comes first."""


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """The model that an adapter belongs to."""

    kind: type[PreTrainedModel]
    labels: int | None
    """How many its configuration must have; None: as many as it has."""


def task_model(config: Any, adapter: Adapter, where: str) -> TaskModel:
    """The class and the number of labels for `adapter` over a base with `config` (a transformers configuration).

    The first class that has all that the adapter changes, of those that its task type stands for, that PEFT noted, or that the
    configuration names. Raises ModelError for a class that transformers lacks, and where it isn't said and several would do.
    """
    wanted = _wanted(config, adapter, where)
    for kind in wanted:
        model = skeleton_of(kind, config)
        if _has_all(model, adapter):
            return TaskModel(kind=kind, labels=_labels(model, adapter))
    found = [] if adapter.task_type else _others(config, adapter, wanted)
    if len(found) > 1:
        raise ModelError(
            f"model {where}: the adapter changes what {wanted[0].__name__} hasn't got, and fits "
            f"{' and '.join(kind.__name__ for kind in found)}. "
            "Say which by task_type in its adapter_config.json (SEQ_CLS, TOKEN_CLS, QUESTION_ANS), or by architectures in the "
            "model's config.json."
        )
    kind = found[0] if found else wanted[0]
    return TaskModel(kind=kind, labels=_labels(skeleton_of(kind, config), adapter))


def vocabulary(config: Any, task: TaskModel, adapter: Adapter) -> int | None:
    """How many ids the adapter's own embedding has, trained in full with tokens that were added; None for as many as before."""
    known = getattr(config.get_text_config(), VOCABULARY, None)
    for path, module in skeleton_of(task.kind, config).named_modules() if adapter.modules else ():
        weight = adapter.modules.get(path, {}).get("weight")
        if (
            isinstance(module, nn.Embedding)
            and weight is not None
            and weight.ndim == 2
            and len(weight) != known == len(module.weight)
        ):
            return len(weight)
    return None


def label_settings(config: Any, task: TaskModel, adapter: Adapter) -> dict[str, Any]:
    """What a configuration says of the names of a classifier's labels, where its task saved them; else nothing."""
    names = label_names(adapter)
    count = len(config.id2label or {}) if task.labels is None else task.labels
    if not names or len(names) != count:
        return {}
    said: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    problem = PROBLEMS.get(adapter.metadata.get("labels.kind", ""))
    return said if problem is None else {**said, "problem_type": problem}


def skeleton_of(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of the class on the meta device: its modules, and no weight."""
    make: Any = kind
    with torch.device("meta"):
        return make._from_config(config)


def auto_name(architecture: str, model_type: str) -> str:
    """The automatic class that loads a model of the class, such as `AutoModelForCausalLM`; else the class itself."""
    from transformers import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type]
        for auto in AUTO:
            if architecture in [kind.__name__ for kind in _classes(auto, config)]:
                return auto.__name__
    return architecture


def is_causal(kind: type[PreTrainedModel], config: Any) -> bool:
    """Whether the class is the model type's language model that continues text."""
    return kind in _classes(AutoModelForCausalLM, type(config))


def reads_text(model: PreTrainedModel) -> bool:
    """Whether ids of tokens are all that the model needs (of an encoder-decoder, for each of the two)."""
    autos = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM, *CLASSIFIERS[:3])
    named = any(type(model) in _classes(auto, type(model.config)) for auto in autos)
    return named and model.main_input_name == "input_ids"


def named_class(config: Any, where: str, *, known: bool) -> type[PreTrainedModel] | None:
    """The class that a configuration names; None where it names none.

    Raises ModelError for one that transformers lacks, unless the class is `known` otherwise.
    """
    import transformers

    names = config.architectures or []
    if not names:
        return None
    found: Any = getattr(transformers, names[0], None)
    if found is None and not known:
        raise ModelError(
            f"model {where}: its class {names[0]!r} isn't one of transformers', so what its tensors are isn't known. "
            "Load it and use merge."
        )
    return found


def _wanted(config: Any, adapter: Adapter, where: str) -> list[type[PreTrainedModel]]:
    """The classes that are asked for, in turn."""
    task = adapter.task_type or ""
    by_task = [kind for auto in BY_TASK.get(task, ()) for kind in _classes(auto, type(config))]
    noted = _noted(adapter)
    named = named_class(config, where, known=bool(noted or by_task))
    first = [named] if named is not None and (not by_task or named in by_task or task in ANY_HEAD) else []
    every: list[type[PreTrainedModel]] = [*([noted] if noted else []), *first, *by_task]
    wanted = list(dict.fromkeys(every)) or ([] if task else _classes(AutoModelForCausalLM, type(config)))
    if not wanted:
        what = f"task type {task} has no class for it" if task else "it names no class (architectures)"
        raise ModelError(
            f"model {where}: its config.json is of type {config.model_type!r}, and {what}, so what the adapter belongs to isn't "
            "known. Name the base that it was trained on."
        )
    return wanted


def _noted(adapter: Adapter) -> type[PreTrainedModel] | None:
    """The class that PEFT notes in a file without a task type."""
    import transformers

    noted = json.loads(adapter.metadata.get("peft.auto_mapping", "null"))
    name = noted.get("base_model_class") if isinstance(noted, Mapping) else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _others(config: Any, adapter: Adapter, tried: list[type[PreTrainedModel]]) -> list[type[PreTrainedModel]]:
    """Classifiers of the model type that have all that the adapter changes."""
    kinds = dict.fromkeys(kind for auto in CLASSIFIERS for kind in _classes(auto, type(config)) if kind not in tried)
    return [kind for kind in kinds if _has_all(skeleton_of(kind, config), adapter)]


def _classes(auto: Any, config: type) -> list[type[PreTrainedModel]]:
    if config not in auto._model_mapping:
        return []
    found = auto._model_mapping[config]
    return list(found) if isinstance(found, tuple | list) else [found]


def _has_all(model: PreTrainedModel, adapter: Adapter) -> bool:
    known = {path for path, _ in model.named_modules()}
    return {*adapter.modules, *adapter.biases, *adapter.token_rows} <= known and adapter.layers.keys() <= {*part_names(model)}


def _labels(model: PreTrainedModel, adapter: Adapter) -> int | None:
    """How many labels the adapter's own layers of labels have, where that isn't what the configuration says."""
    for path in label_layers(model):
        for module, values in adapter.modules.items():
            if path == module or path.startswith(f"{module}."):
                weight = values.get(f"{path.removeprefix(module)}.weight".lstrip("."))
                if weight is not None and weight.ndim == 2 and len(weight) - extra_outputs(model) != model.config.num_labels:
                    return len(weight) - extra_outputs(model)
    return None
