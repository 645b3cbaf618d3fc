"""`ImageClassification`: a picture model under the bank, each adapter with a head for its own labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank.bank.adaptable import linear_layers
from lorabank.bank.in_full.heads import head_paths
from lorabank.bank.routing import RowRoute
from lorabank.bank.target_parts import ALL_LINEAR, as_list
from lorabank.config.images import ImagesConfig
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.parts import is_out_of_memory
from lorabank.errors import ConfigError, DataError, LorabankError, Setting, closest, first_line
from lorabank.formats.adapter import Adapter
from lorabank.formats.labels import LABELS
from lorabank.tasks.images.answers import Answers
from lorabank.tasks.images.augment import augment, kornia
from lorabank.tasks.images.kept import KEPT
from lorabank.tasks.images.load import own_labels, size_of
from lorabank.tasks.images.metrics import METRICS, TOP, TOP5, check_top5, scores
from lorabank.tasks.images.model import find_head, logits_of
from lorabank.tasks.images.predict import predict
from lorabank.tasks.images.prepare import PreparedImages, prepare_images
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.preview import preview
from lorabank.tasks.images.rows import ImageRow, PixelStore
from lorabank.tasks.images.samples import write_samples
from lorabank.tasks.own_head import check_numbers, keeps_own_head, names_given
from lorabank.training.base_rows import is_base
from lorabank.training.data_sets import DataSets, RowObjects, adapter_runs, read_sets
from lorabank.training.evaluate import spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.processors import MADE_WITH
from lorabank.training.scorers import check_among
from lorabank.training.task import TASK_KEY, Busy, Draws, Prediction, Task
from lorabank.wording import counted

GIB = 2**30
PIXELS, TARGET = "pixel_values", "labels"


def cross_entropy(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """−log p(label) of each picture, nats (N,)."""
    return F.cross_entropy(logits_of(model, inputs[PIXELS]), targets[TARGET], reduction="none")


class ImageClassification(Task[ImageRow]):
    """Of one model: transformers', timm's, or any `nn.Module` that gives a number a label."""

    name = "image-classification"
    unit = "images"
    section = "images"

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        self._images: ImagesConfig = KEPT.merged(config.images, loaded)
        plain = processor is None
        if plain:
            said = getattr(getattr(model, "config", None), "image_size", None)
            processor = plain_processor(replace(self._images, image_size=self._images.image_size or size_of(said)))
        preprocess = read_off(processor, self._images)
        super().__init__(config, model, preprocess.processor)
        self._made_with = {} if plain else {MADE_WITH: type(processor).__name__}
        first = next(model.parameters())
        self._device, self._dtype = first.device, first.dtype
        self.store = PixelStore(preprocess, config.images.cache_gib * GIB)
        known, width = own_labels(model), self._width()
        if known is None and any(keeps_own_head(run.modules_to_save) for run in adapter_runs(config).values()):
            known = names_given(config.images.labels, width, "images")
        self._named = known is not None
        """Whether somebody named the labels of the model's own head."""
        self.base_labels = tuple(map(str, range(width))) if known is None else known
        """The model's own labels; numbered where nobody named them: counted here, before adapters stand in the model's way."""
        self._labels = {name: self._labels_of(name, adapter) for name, adapter in loaded.items()}
        """Adapter to its labels' names, in the order of its head's outputs."""
        self._scoring = bool(loaded)
        self._head = config.images.head or find_head(model, preprocess.height, preprocess.width)
        if config.images.augment:
            kornia()

    @property
    def head(self) -> str | None:
        """The module that gives a number a label, where the model's class doesn't say."""
        return self._head

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[ImageRow]:
        runs = adapter_runs(config)

        def one(name: str, train: Source | None, val: Source | None) -> PreparedImages:
            run = runs[name]
            unnamed = not self._scoring and not self._named and run.init_from is None and keeps_own_head(run.modules_to_save)
            labels = None if unnamed else self._given_labels(name, run.init_from, run.modules_to_save)
            prepared = prepare_images(
                config.data,
                config.images,
                self.store,
                seed=config.seed,
                train=train,
                val=val,
                labels=labels,
                scoring=self._scoring,
                progress=progress,
            )
            if unnamed:
                check_numbers(name, prepared.labels, self.base_labels, "images")
                prepared = replace(prepared, labels=self.base_labels)
            return prepared

        sets = read_sets(config, rows, one)
        if not self._scoring:
            self._labels = {name: own.labels for name, own in sets.by_adapter.items() if isinstance(own, PreparedImages)}
        return sets

    def _given_labels(self, name: str, init_from: str | None, saved: Sequence[str] | None) -> Sequence[str] | None:
        """The labels that a head has already: a loaded adapter's, that of what training goes on from, or the model's own."""
        if self._scoring:
            return list(dict.fromkeys(label for own in self._labels.values() for label in own))
        if init_from is not None and (start := Adapter.load(init_from)).metadata.get(TASK_KEY, self.name) == self.name:
            return self._labels_of(init_from, start)
        return self.base_labels if keeps_own_head(saved) else None

    def _labels_of(self, name: str, adapter: Adapter) -> tuple[str, ...]:
        """What a loaded adapter says of its labels; of one that another tool made their numbers."""
        if LABELS in adapter.metadata:
            return tuple(json.loads(adapter.metadata[LABELS]))
        widths = [len(values["bias"]) for values in adapter.modules.values() if "bias" in values and values["bias"].ndim == 1]
        known = self.base_labels
        return known if not widths or widths[-1] == len(known) else tuple(map(str, range(widths[-1])))

    @property
    def base_is_trained(self) -> bool:
        """Whether the model's own head says something: not where transformers numbered its labels, since nobody trained it."""
        return self._named or self.scores_base or not isinstance(self.model, PreTrainedModel)

    @property
    def adapter_labels(self) -> Sequence[Sequence[str]]:
        """Of every adapter."""
        return list(self._labels.values())

    def _width(self) -> int:
        """Outputs for a blank picture. Raises ConfigError where the model takes none of this size."""
        preprocess = self.store.preprocess
        blank = torch.zeros(1, 3, preprocess.height, preprocess.width, device=self._device, dtype=self._dtype)
        try:
            with torch.no_grad(), evaluation_mode(self.model.modules()):
                return logits_of(self.model, blank).shape[1]
        except (ValueError, RuntimeError) as error:
            if isinstance(error, LorabankError) or is_out_of_memory(error):
                raise
            sides = f"{preprocess.width} × {preprocess.height} pixels"
            raise ConfigError(
                Setting("images.image_size"), f": {type(self.model).__name__} takes no pictures of {sides}: {first_line(error)}"
            ) from error

    def use_labels(self, labels: Mapping[str, Sequence[str]]) -> None:
        """Say what adapters' labels are, in a loop of one's own: `read` and loading do so by themselves."""
        self._labels |= {name: tuple(own) for name, own in labels.items()}

    def labels_of(self, name: str) -> tuple[str, ...]:
        """Of an adapter, or of the base."""
        return self.base_labels if is_base(name) else self._labels[name]

    def previewed(self, rows: Sequence[ImageRow], count: int) -> Sequence[int]:
        """One of each label in turn: folders come sorted by it."""
        places: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            places.setdefault(row.reference, []).append(number)
        turns = sorted((turn, number) for own in places.values() for turn, number in enumerate(own))
        return [number for _, number in turns[:count]]

    def preview(self, name: str, rows: Sequence[ImageRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        return preview(self, name, rows, out, draws)

    def batch(
        self, rows: Sequence[Sequence[ImageRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for own in rows for row in own]
        labels = [self.labels_of(route) if isinstance(route, str) else self.base_labels for route in routes]
        true = [own.index(row.label) if row.label in own else 0 for row, own in zip(flat, labels, strict=True)]
        return ModelBatch(
            inputs={PIXELS: self._pixels(flat, draws)},
            targets={TARGET: torch.tensor(true)},
            loss=cross_entropy,
            routes=tuple(routes),
            weights=(1.0,) * len(flat),
            sizes=(1,) * len(flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    def _pixels(self, rows: Sequence[ImageRow], draws: Sequence[int]) -> Tensor:
        """(N, C, H, W) on the model's device, varied where a draw isn't zero."""
        x = self.store.stacked(rows).to(self._device, non_blocking=True).float() / 255
        if any(draws):
            x = augment(x, draws, self.config.images.augment)
        return self.store.preprocess.normalise(x).to(self._dtype)

    def missing_labels(self, name: str, rows: Sequence[ImageRow]) -> Sequence[str]:
        there = {row.label for row in rows}
        return [label for label in self.labels_of(name) if label not in there]

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def check(self, name: str, job: AdapterJob) -> None:
        check_top5(self.config.eval.metrics, [len(own) for own in self._labels.values()])
        heads = tuple(head_paths(self.model, self._head))
        inner = [
            path for path in linear_layers(self.model) if path not in heads and not path.startswith(tuple(f"{h}." for h in heads))
        ]
        if as_list(job.run.targets) == [ALL_LINEAR] and not inner:
            raise ConfigError(
                Setting(f"adapters.{name}.targets"),
                f": the only linear layers of {type(self.model).__name__} are its head's, which is trained anyway. Use targets "
                "'all-conv', or ['all-linear', 'all-conv'].",
            )

    def labels(self, adapter: str) -> int | None:
        runs = adapter_runs(self.config)
        saved = runs[adapter].modules_to_save if adapter in runs else None
        return None if keeps_own_head(saved) else len(self._labels[adapter])

    def about(self, adapter: str) -> Mapping[str, str]:
        labels = json.dumps(self._labels[adapter], ensure_ascii=False)
        return {LABELS: labels, **KEPT.as_metadata(self._images), **self._made_with}

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        return "nats a picture"

    @property
    def scores_base(self) -> bool:
        if not self._labels:  # a model by itself, such as a merged one
            return self._named
        return all(keeps_own_head(run.modules_to_save) for run in adapter_runs(self.config).values())

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        check_metrics(config.metrics)
        few = bool(self._labels) and max(map(len, self._labels.values())) <= TOP
        return [name for name in METRICS if not (few and name == TOP5)]

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[ImageRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        self._check_labels(rows)
        found = Answers(self, engine).of(rows, batch_size=config.batch_size, busy=busy)
        return {
            name: scores(answers, self.true(name, rows[name]), len(self.labels_of(name)))
            for name, answers in found.items()
            if answers
        }

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[ImageRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        check_top5(config.metrics, [len(self.labels_of(name)) for name in rows])
        return self.validate(engine, _spread(rows, config), config=config, busy=busy)

    def true(self, name: str, rows: Sequence[ImageRow]) -> list[int]:
        """The numbers of the rows' labels."""
        own = self.labels_of(name)
        return [own.index(row.reference) for row in rows]

    def _check_labels(self, rows: Mapping[str, Sequence[ImageRow]]) -> None:
        for name, own in rows.items():
            known = set(self.labels_of(name))
            lacking = [row for row in own if row.label not in known]
            if lacking:
                label = lacking[0].reference
                raise DataError(
                    f"{lacking[0].origin}: its label {label!r} is none of the {len(known)} that {name!r} has"
                    f"{closest(label, known)}, as with {len(lacking):,} of {counted(len(own), 'picture')}. "
                    f"Score {name!r} on others, or "
                    "name the adapters that know these (--adapters)."
                )

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[ImageRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        if config.samples:
            write_samples(self, engine, _spread(rows, config), folder, config=config, busy=busy)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return predict(self, engine, wanted, busy=busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="label pictures of your own:", asks=[Ask(data="pictures/", output="labels.jsonl")])


def _spread(rows: Mapping[str, Sequence[ImageRow]], config: EvalConfig) -> dict[str, Sequence[ImageRow]]:
    """At most `max_rows` of each name's, evenly over them."""
    return {name: spread(own, config.max_rows) for name, own in rows.items()}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that isn't one of a classifier's."""
    check_among(metrics, ("loss", *METRICS))
