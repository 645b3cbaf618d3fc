"""`ObjectDetection`: a detector's body under the bank, each adapter with a head for its own categories."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.routing import RowRoute
from lorabank.config.detection import DetectionConfig
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import infer
from lorabank.engine.modes import evaluation_mode
from lorabank.engine.parts import is_out_of_memory
from lorabank.errors import ConfigError, DataError, LorabankError, Setting, first_line
from lorabank.formats.adapter import Adapter
from lorabank.formats.labels import LABELS as LABELS_SAID
from lorabank.tasks.detection.augment import augment
from lorabank.tasks.detection.kept import KEPT
from lorabank.tasks.detection.load import check_detector, load_detector
from lorabank.tasks.detection.loss import BOXES, CLASSES, LABELS, MASK, PIXELS, detection_loss, found_boxes, split_found
from lorabank.tasks.detection.metrics import METRICS, check_libraries, coco_scores
from lorabank.tasks.detection.predict import check_output, predict
from lorabank.tasks.detection.prepare import DetectionSets, prepare
from lorabank.tasks.detection.preprocess import PixelStore, read_off
from lorabank.tasks.detection.preview import preview
from lorabank.tasks.detection.rows import Box, DetectionRow
from lorabank.tasks.detection.samples import write_samples
from lorabank.tasks.image_processors import IMAGE_PROCESSOR
from lorabank.tasks.own_head import check_numbers, keeps_own_head, names_given, numbered
from lorabank.training.base_rows import is_base
from lorabank.training.data_sets import DataSets, RowObjects, adapter_runs, read_sets
from lorabank.training.evaluate import route_of, spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.scorers import check_among
from lorabank.training.task import Busy, Draws, Prediction, Task, TaskKind

GIB = 2**30
IDS_KEY = "category_ids"
"""Of an adapter's metadata: a category's name to its number in the data, as a JSON object."""
Found = dict[str, list[list[tuple[float, Box]]]]
"""Name → each row's boxes with their scores, the likeliest first."""


class ObjectDetection(Task[DetectionRow]):
    """Of one of transformers' detectors."""

    name = "object-detection"
    unit = "images"
    section = "detection"

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, processor)
        self._detection: DetectionConfig = KEPT.merged(config.detection, loaded)
        check_libraries()
        check_detector(model, config.model or type(model).__name__)
        self.store = PixelStore(read_off(processor, self._detection.image_size), config.detection.cache_gib * GIB)
        if self._detection.image_size is not None:
            self._check_canvas(model)
        self._masked = MASK in inspect.signature(model.forward).parameters
        """Whether the model is told where the picture is on its canvas, and means shares of the picture then."""
        self._scoring = bool(loaded)
        self._labels = {
            name: tuple(json.loads(a.metadata[LABELS_SAID])) for name, a in loaded.items() if LABELS_SAID in a.metadata
        }
        self._ids = {name: json.loads(a.metadata.get(IDS_KEY, "{}")) for name, a in loaded.items()}

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(
        self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None
    ) -> DataSets[DetectionRow]:
        runs = adapter_runs(config)

        def one(name: str, train: Source | None, val: Source | None) -> DetectionSets:
            run = runs[name]
            kept = not self._scoring and run.init_from is None and keeps_own_head(run.modules_to_save)
            unnamed = kept and numbered(self.base_labels)
            sets = prepare(
                config.data,
                config.detection,
                seed=config.seed,
                train=train,
                val=val,
                keep=self.store.keep,
                labels=None if unnamed else self._given_labels(name, run.init_from, run.modules_to_save),
                progress=progress,
            )
            if unnamed:
                check_numbers(name, sets.labels, self.base_labels, "detection")
                sets = replace(sets, labels=self.base_labels)
            return sets

        sets = read_sets(config, rows, one)
        if not self._scoring:
            for name, own in sets.by_adapter.items():
                if isinstance(own, DetectionSets):
                    self._labels[name], self._ids[name] = own.labels, dict(own.category_ids)
        return sets

    def _given_labels(self, name: str, init_from: str | None, saved: Sequence[str] | None) -> Sequence[str] | None:
        """The categories that a head has already: loaded adapters', that of what training goes on from, or the model's own."""
        if self._scoring:
            return list(dict.fromkeys(label for own in self._labels.values() for label in own))
        if init_from is not None:
            found = Adapter.load(init_from).metadata.get(LABELS_SAID)
            if found is None:
                raise ConfigError(
                    Setting(f"adapters.{name}.init_from"),
                    f": {init_from} doesn't say its categories. Start from one of lorabank's.",
                )
            return json.loads(found)
        return self.base_labels if keeps_own_head(saved) else None

    @property
    def base_labels(self) -> tuple[str, ...]:
        """The model's own; where nobody named them, what `detection.labels` says of a head that is kept."""
        known: Any = self.model.config
        own = tuple(str(known.id2label[i]) for i in range(known.num_labels))
        kept = any(keeps_own_head(run.modules_to_save) for run in adapter_runs(self.config).values())
        return (names_given(self.config.detection.labels, len(own), "detection") if kept and numbered(own) else None) or own

    def _check_canvas(self, model: nn.Module) -> None:
        """Raise ConfigError where the model takes no pictures of the size that was asked for."""
        canvas, first = self.store.preprocess, next(model.parameters())
        blank = torch.zeros(1, 3, canvas.height, canvas.width, device=first.device, dtype=first.dtype)
        try:
            with torch.no_grad(), evaluation_mode(model.modules()):
                model(blank)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, LorabankError) or is_out_of_memory(error):
                raise
            raise ConfigError(
                Setting("detection.image_size"),
                f": {type(model).__name__} takes no pictures of {canvas.width} × {canvas.height} pixels: {first_line(error)}. "
                "Most detectors take multiples of 32.",
            ) from error

    def labels_of(self, name: str) -> tuple[str, ...]:
        """Of an adapter, or of the base."""
        return self.base_labels if is_base(name) or name not in self._labels else self._labels[name]

    def category_id(self, name: str, label: str) -> int:
        """A category's number as its data had it, else its place in the head."""
        return int(self._ids.get(name, {}).get(label, self.labels_of(name).index(label)))

    def preview(self, name: str, rows: Sequence[DetectionRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        return preview(self, name, rows, out, draws)

    def batch(
        self, rows: Sequence[Sequence[DetectionRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        labels = [self.labels_of(route) if isinstance(route, str) else self.base_labels for route in routes]
        made = [self.row_tensors(row, own, draw) for row, own, draw in zip(flat, labels, draws, strict=True)]
        x_NCHW, mask_NHW = self.store.preprocess.stacked([picture for picture, _, _ in made])
        most = max(1, *(len(boxes) for _, boxes, _ in made))
        boxes_NM4, labels_NM = torch.zeros(len(made), most, 4), torch.full((len(made), most), -1)
        for i, (_, boxes, numbers) in enumerate(made):
            boxes_NM4[i, : len(boxes)], labels_NM[i, : len(boxes)] = boxes, numbers
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return ModelBatch(
            inputs={PIXELS: x_NCHW.to(dtype), **({MASK: mask_NHW} if self._masked else {})},
            targets={BOXES: boxes_NM4, LABELS: labels_NM, CLASSES: torch.tensor([len(own) for own in labels])},
            loss=detection_loss,
            routes=tuple(routes),
            weights=(1.0,) * len(flat),
            sizes=(1,) * len(flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    def row_tensors(self, row: DetectionRow, labels: Sequence[str], draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled pixels, boxes (M, 4) as the model has them, and their labels' numbers (M,)."""
        own = [box for box in row.boxes if box.label in labels and not box.crowd]
        sides = torch.tensor([row.width, row.height, row.width, row.height], dtype=torch.float32)
        corners = torch.tensor([[b.x, b.y, b.x + b.width, b.y + b.height] for b in own]).reshape(-1, 4) / sides
        numbers = torch.tensor([labels.index(box.label) for box in own], dtype=torch.int64)
        picture = self.store.pixels(row)
        if draw and self.config.detection.augment:
            picture, corners, left = augment(picture, corners, draw, self.config.detection.augment)
            corners, numbers = corners[left], numbers[left]
        corners = corners * self.share(picture.shape[-2], picture.shape[-1])
        centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        return picture, torch.cat([centre, size], 1), numbers

    def share(self, height: int, width: int) -> Tensor:
        """(4,): shares of the canvas for shares of a scaled picture, unless the model is told where the picture is."""
        canvas = self.store.preprocess
        return torch.ones(4) if self._masked else torch.tensor([width / canvas.width, height / canvas.height]).repeat(2)

    def missing_labels(self, name: str, rows: Sequence[DetectionRow]) -> Sequence[str]:
        there = {box.label for row in rows for box in row.boxes}
        return [label for label in self.labels_of(name) if label not in there]

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def check(self, name: str, job: AdapterJob) -> None:
        known = set(self._labels.get(name, ()))
        held: Sequence[Any] = spread(job.val, self.config.eval.max_rows)
        if held and not any(box.label in known and not box.crowd for row in held for box in row.boxes):
            single = " round a single thing" if any(box.crowd for row in held for box in row.boxes) else ""
            raise DataError(
                f"adapter {name!r}: none of the {len(held):,} held-out pictures of {job.data} has a box{single}, so nothing "
                "could be scored. Hold out others (data.val), more (data.val_split), or none (data.val_split: 0)."
            )

    def labels(self, adapter: str) -> int | None:
        saved = adapter_runs(self.config)[adapter].modules_to_save
        return None if keeps_own_head(saved) else len(self._labels[adapter])

    def about(self, adapter: str) -> Mapping[str, str]:
        ids = self._ids.get(adapter)
        return {
            LABELS_SAID: json.dumps(self._labels[adapter], ensure_ascii=False),
            **KEPT.as_metadata(self._detection),
            **({IDS_KEY: json.dumps(ids, ensure_ascii=False)} if ids else {}),
        }

    def engine(self, bank: Any) -> Engine:
        """Boxes are matched on the host, which no captured pass could do."""
        return replace(super().engine(bank), cuda_graphs=False)

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        return "of matched boxes and categories, a picture"

    @property
    def scores_base(self) -> bool:
        if not self._labels:  # a model by itself, such as a merged one
            return not numbered(self.base_labels)
        runs = adapter_runs(self.config).values()
        return all(keeps_own_head(run.modules_to_save) for run in runs)

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return list(METRICS)

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[DetectionRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        rows = {name: spread(own, config.max_rows) for name, own in rows.items() if own}
        losses, found = self.find(engine, rows, batch_size=config.batch_size, busy=busy)
        scores: dict[str, dict[str, float]] = {}
        for name, own in rows.items():
            scores[name] = {"loss": sum(losses[name]) / len(own), **coco_scores(own, found[name], self.labels_of(name))}
            if math.isnan(scores[name]["mAP"]):
                raise DataError(
                    f"{own[0].origin} and the other {len(own) - 1:,} pictures: no box of what {name!r} finds "
                    f"({', '.join(self.labels_of(name)[:8])}), so nothing can be scored. Give others."
                )
        return scores

    def find(
        self,
        engine: Engine,
        rows: Mapping[str, Sequence[DetectionRow]],
        *,
        batch_size: int,
        busy: Busy,
        activity: str = "validation",
    ) -> tuple[dict[str, list[float]], Found]:
        """Each row's loss, and its likeliest boxes, of each name on its rows; all names in common passes."""
        jobs = [(name, row) for name, own in rows.items() for row in own]
        losses: dict[str, list[float]] = {name: [] for name in rows}
        found: Found = {name: [] for name in rows}
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            batch = self.batch(
                [[row] for _, row in part], [route_of(name) for name, _ in part], examples=range(len(part)), draws=[0] * len(part)
            )
            values, boxes = split_found(infer(engine, batch, found_boxes).float().cpu())
            for (name, row), loss, table in zip(part, values.tolist(), boxes, strict=True):
                losses[name].append(loss)
                found[name].append(self._boxes(name, row, table))
            busy(activity, min(start + batch_size, len(jobs)), len(jobs))
        return losses, found

    def _boxes(self, name: str, row: DetectionRow, table_K6: Tensor) -> list[tuple[float, Box]]:
        """Found boxes in the picture's own pixels, cut to it; none of a model that went NaN."""
        labels = self.labels_of(name)
        height, width = self.store.preprocess.scaled_size(row.width, row.height)
        sides = torch.tensor([row.width, row.height, row.width, row.height], dtype=torch.float32)
        half = table_K6[:, 4:] / 2
        corners = torch.cat([table_K6[:, 2:4] - half, table_K6[:, 2:4] + half], 1) / self.share(height, width) * sides
        corners = torch.minimum(corners.clamp(min=0), sides)
        made = []
        for (score, label), (left, top, right, bottom) in zip(table_K6[:, :2].tolist(), corners.tolist(), strict=True):
            if math.isfinite(score) and right > left and bottom > top:
                made.append((score, Box(labels[int(label)], left, top, right - left, bottom - top)))
        return made

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[DetectionRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        write_samples(self, engine, rows, folder, config=config, busy=busy)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return predict(self, engine, wanted, busy=busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="find things in pictures of your own:", asks=[Ask(data="pictures/", output="found/")])


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that isn't one of detection's."""
    check_among(metrics, ("loss", *METRICS))


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> ObjectDetection:
    return ObjectDetection(config, model, processor, adapters)


KIND = TaskKind(load=load_detector, open=_open, check_metrics=check_metrics, processor=IMAGE_PROCESSOR, check_output=check_output)
