"""`TextClassification`: a classifier's body under the bank, each adapter with a head for its own labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabank.bank.routing import RowRoute
from lorabank.config.train import DataConfig, EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.row_report import Splits
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.engine.model_pass import infer
from lorabank.errors import ConfigError, DataError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.models.load_class import load_class, tokenizer_of
from lorabank.tasks.text_classification.rows import LabelledText, prepare
from lorabank.training.data_sets import DataSets, RowObjects, adapter_runs, read_sets
from lorabank.training.evaluate import route_of
from lorabank.training.task import BaseRequest, Busy, Prediction, Say, Task, TaskBase, TaskKind

LABELS_KEY = "labels"
"""Of an adapter's metadata: its labels' names as a JSON list."""
METRICS = ("loss", "accuracy")


def cross_entropy(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """−log p(label) of each row, nats (N,)."""
    return F.cross_entropy(_logits(model, inputs).float(), targets["labels"], reduction="none")


def _logits(model: nn.Module, inputs: Tensors) -> Tensor:
    return model(**inputs).logits


class TextClassification(Task[LabelledText]):
    """Of one encoder, or decoder, with a classifier's head."""

    name = "text-classification"
    unit = "tokens"
    section = "classification"

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, processor)
        self._labels: dict[str, list[str]] = {
            name: json.loads(adapter.metadata[LABELS_KEY]) for name, adapter in loaded.items() if LABELS_KEY in adapter.metadata
        }
        """Adapter to its labels' names."""

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(
        self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None
    ) -> DataSets[LabelledText]:
        def one(_name: str, train: Source | None, val: Source | None) -> Splits[LabelledText]:
            return prepare(
                config.data, config.classification, self.processor, seed=config.seed, train=train, val=val, progress=progress
            )

        sets = read_sets(config, rows, one)
        for name in adapter_runs(config):
            self._labels.setdefault(name, self._names(name, sets.by_adapter[name].train))
            self._check_labels(name, sets.by_adapter[name])
        return sets

    def _names(self, name: str, rows: Sequence[LabelledText]) -> list[str]:
        """The labels of an adapter that is trained on `rows`."""
        given = self.config.classification.labels
        found = sorted({row.reference for row in rows}, key=_order)
        if given is None and len(found) < 2:
            raise DataError(
                f"adapter {name!r}: all of its {len(rows):,} training rows have the label {found[0]!r}: nothing to tell apart."
            )
        return list(given) if given is not None else found

    def _check_labels(self, name: str, sets: Any) -> None:
        known = set(self._labels[name])
        for row in (*sets.train, *sets.val, *sets.test):
            if row.reference not in known:
                raise DataError(
                    f"{row.origin}: label {row.reference!r}, which adapter {name!r} hasn't"
                    f"{closest(row.reference, known)}. Its labels are: {', '.join(sorted(known)[:10])}."
                )

    def batch(
        self, rows: Sequence[Sequence[LabelledText]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        longest = max(row.size for row in flat)
        ids = torch.full((len(flat), longest), int(self.processor.pad_token_id))
        mask = torch.zeros(len(flat), longest, dtype=torch.int64)
        types = torch.zeros(len(flat), longest, dtype=torch.int64)
        for i, row in enumerate(flat):
            ids[i, : row.size] = torch.tensor(row.input_ids)
            mask[i, : row.size] = 1
            if row.token_type_ids is not None:
                types[i, : row.size] = torch.tensor(row.token_type_ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(row.token_type_ids is not None for row in flat):
            inputs["token_type_ids"] = types
        labels = [self._label_id(row, route) for row, route in zip(flat, routes, strict=True)]
        return ModelBatch(
            inputs=inputs,
            targets={"labels": torch.tensor(labels)},
            loss=cross_entropy,
            routes=tuple(routes),
            weights=(1.0,) * len(flat),
            sizes=tuple(row.size for row in flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    def _label_id(self, row: LabelledText, route: RowRoute) -> int:
        names = self._labels.get(route) if isinstance(route, str) else None
        names = names or self._own_labels()
        return names.index(row.reference) if row.reference in names else 0

    def _own_labels(self) -> list[str]:
        """The base's."""
        known: Any = self.model.config
        return [str(known.id2label[i]) for i in range(known.num_labels)]

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def labels(self, adapter: str) -> int | None:
        return len(self._labels[adapter])

    def about(self, adapter: str) -> Mapping[str, str]:
        return {LABELS_KEY: json.dumps(self._labels[adapter], ensure_ascii=False)}

    @property
    def scores_base(self) -> bool:
        return False

    # ---- scores -----------------------------------------------------------------------------------------------------

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return METRICS[1:]

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[LabelledText]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        jobs = sorted(((name, row) for name, own in rows.items() for row in own), key=lambda job: job[1].size)
        sums = {name: [0.0, 0.0] for name in rows}
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            logits, labels = self._scored(engine, part)
            losses = F.cross_entropy(logits, labels, reduction="none").tolist()
            hits = (logits.argmax(-1) == labels).tolist()
            for (name, _), loss, hit in zip(part, losses, hits, strict=True):
                sums[name][0] += loss
                sums[name][1] += hit
            busy("validation", min(start + config.batch_size, len(jobs)), len(jobs))
        return {
            name: {"loss": sums[name][0] / len(own), "accuracy": sums[name][1] / len(own)} for name, own in rows.items() if own
        }

    def _scored(self, engine: Engine, part: Sequence[tuple[str, LabelledText]]) -> tuple[Tensor, Tensor]:
        """fp32 logits (N, labels) and label ids (N,), on the host."""
        batch = self.batch(
            [[row] for _, row in part], [route_of(name) for name, _ in part], examples=range(len(part)), draws=[0] * len(part)
        )
        logits = infer(engine, batch, lambda model, inputs, targets: _logits(model, inputs)).float().cpu()
        return logits, batch.targets["labels"]

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        data = DataConfig(train=wanted.data, val_split=0, limit=wanted.max_rows)
        columns = self.config.classification
        rows = prepare(data, columns, self.processor, seed=0, train=None, val=None, labelled=False).train
        lines = []
        for start in range(0, len(rows), wanted.batch_size):
            part = rows[start : start + wanted.batch_size]
            jobs = [(name, row) for row in part for name in wanted.names]
            logits, _ = self._scored(engine, jobs)
            for i, row in enumerate(part):
                line: dict[str, Any] = {"text": row.text, **({} if row.pair is None else {"text_pair": row.pair})}
                for j, name in enumerate(wanted.names):
                    names = self._labels.get(name) or self._own_labels()
                    shares = logits[i * len(wanted.names) + j].softmax(-1)[: len(names)].tolist()
                    best = max(range(len(names)), key=shares.__getitem__)
                    line[name] = {"label": names[best], "score": round(shares[best], 6)}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            busy("predicting", min(start + wanted.batch_size, len(rows)), len(rows))
        write_files(wanted.output.parent, {wanted.output.name: "".join(lines).encode()})
        return f"{len(rows)} rows labelled by {', '.join(wanted.names)}: {wanted.output}"

    def next_lines(self, output: str, names: Sequence[str]) -> Sequence[tuple[str, Sequence[str]]]:
        return [("label rows of your own:", [f"lorabank predict {output} --data rows.jsonl --output labels.jsonl"])]


def _order(label: str) -> tuple[bool, int, str]:
    """Numbers by their value, before names."""
    return not label.isdigit(), int(label) if label.isdigit() else 0, label


def _check_metrics(metrics: Sequence[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"expected some of {', '.join(METRICS)}, got {name!r}{closest(name, METRICS)}")


def _load(request: BaseRequest, say: Say) -> TaskBase:
    from transformers import AutoModelForSequenceClassification

    base = load_class(
        request.model,
        AutoModelForSequenceClassification,
        tokenizer_of,
        dtype=request.dtype,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        say=say,
    )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> TextClassification:
    return TextClassification(config, model, processor, adapters)


KIND = TaskKind(load=_load, open=_open, check_metrics=_check_metrics)
