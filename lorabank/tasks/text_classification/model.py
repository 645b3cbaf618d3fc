"""The base of text classification: any `…ForSequenceClassification` of transformers, and what its rows need of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorabank.errors import ConfigError
from lorabank.models.load_class import load_class, tokenizer_of
from lorabank.tasks.text_classification.labels import REGRESSION, SINGLE, LabelSet
from lorabank.training.task import BaseRequest, Say, TaskBase

HEAD_SEED = 0
"""Of what a base's files lack: heads of several layers begin with the base's values, so runs of one seed begin alike."""
ONE_INPUT = ("deberta", "deberta-v2")
"""Model types that project positions once for all rows of a pass, so that its rows have one route."""
_PROBLEMS = {"regression": REGRESSION, "multi_label_classification": "multi", "single_label_classification": SINGLE}


def load_classifier(request: BaseRequest, say: Say) -> TaskBase:
    """The model, its head random where its files have none, and its tokenizer. Raises ModelError and ConfigError."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        base = load_class(
            request.model,
            AutoModelForSequenceClassification,
            tokenizer_of,
            dtype=request.dtype,
            device=request.device,
            trust_remote_code=request.trust_remote_code,
            say=say,
        )
    notes = list(base.notes)
    config: Any = base.model.config
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = base.processor.pad_token_id
        notes.append(
            "the model's configuration names no pad token, by which a decoder's head finds a row's last token: "
            f"{base.processor.pad_token!r} is taken. Other tools need model.config.pad_token_id = {base.processor.pad_token_id}."
        )
    if has_one_input(base.model):
        notes.append(
            f"{type(base.model).__name__} projects positions once for all rows of a pass: in each step adapters go through it "
            "one after the other, so joint training saves no time."
        )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=notes)


def has_one_input(model: nn.Module) -> bool:
    """Whether the rows of a pass must have one route."""
    config: Any = model.config
    return config.model_type in ONE_INPUT


def pad_id(model: nn.Module) -> int:
    """The id that rows are filled up with: the model's, since some models find a row's end, or its positions, by it.

    Raises ConfigError for a model without.
    """
    config: Any = model.config
    found = config.get_text_config().pad_token_id
    if not isinstance(found, int):
        raise ConfigError(
            f"{type(model).__name__}: its configuration names no pad token, so rows of different lengths can't share a batch. "
            "Set model.config.pad_token_id = tokenizer.pad_token_id first."
        )
    return found


def positions(model: nn.Module) -> int | None:
    """Tokens that a row may have, by the model's table of positions; None where there is no such limit.

    RoBERTa's and its kin's tables have rows that padding takes.
    """
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return longest if module.padding_idx is None else longest - module.padding_idx - 1
    return longest


def own_labels(model: nn.Module) -> LabelSet | None:
    """The labels of a head that was trained before, by the configuration's names; None where they are `LABEL_0` and so on."""
    config: Any = model.config
    names: Mapping[int, str] = config.id2label or {}
    if not names or all(str(name) == f"LABEL_{i}" for i, name in names.items()):
        return None
    kind = _PROBLEMS.get(config.problem_type or "", SINGLE)
    ordered = tuple(str(names[i]) for i in sorted(names))
    if kind == SINGLE and len(ordered) == 1:
        kind = REGRESSION
    return LabelSet(kind=kind, names=ordered)
