"""`TextClassification`: an encoder's or decoder's body under the bank, each adapter with a head for its own labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.data.row import RowError
from lorabank.engine.engine import Engine
from lorabank.engine.head import accepted
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.engine.model_pass import infer
from lorabank.errors import ConfigError, DataError, Setting
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.formats.labels import LABELS
from lorabank.tasks.asked import check_json_lines
from lorabank.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, LabelSet, names_in, shown
from lorabank.tasks.text_classification.metrics import METRICS, Scored, check_metrics, compute, expanded, metrics_of, predicted
from lorabank.tasks.text_classification.model import has_one_input, load_classifier, own_labels, pad_id, positions
from lorabank.tasks.text_classification.pages import Outcome, page, picture
from lorabank.tasks.text_classification.predict import predict_rows
from lorabank.tasks.text_classification.prepare import PreparedTexts, prepare_texts
from lorabank.tasks.text_classification.rows import ClassRow
from lorabank.tasks.text_classification.targets import losses_of, outputs_of, row_losses, targets_of
from lorabank.tasks.text_classification.texts_a_row import TEXTS_KEY, texts_of_adapters, texts_of_rows, warn_of_texts
from lorabank.training.base_rows import is_base
from lorabank.training.data_sets import DataSets, RowObjects, adapter_runs, read_sets
from lorabank.training.evaluate import route_of, spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.task import TASK_KEY, Busy, Draws, Prediction, Task, TaskKind
from lorabank.wording import counted

LABELS_KEY, KIND_KEY = LABELS, "labels.kind"
"""Of an adapter's metadata: its labels' names as a JSON list, and their kind."""


class TextClassification(Task[ClassRow]):
    """Of one model with a classifier's head."""

    name = "text-classification"
    unit = "tokens"
    section = "classification"

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, processor)
        self.pad_id = pad_id(model)
        self.own = own_labels(model)
        """Those of a head that the base was trained with."""
        self.sets: dict[str, LabelSet] = {name: _kept(name, adapter) for name, adapter in loaded.items() if _knows(adapter)}
        """Adapter to its labels."""
        self.texts = texts_of_adapters(loaded)
        self._segments = "token_type_ids" in accepted(model) and getattr(model.config, "type_vocab_size", 2) > 1

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[ClassRow]:
        found: dict[int, LabelSet] = {}
        for name, run in adapter_runs(config).items():
            if run.init_from is not None and name not in self.sets and _knows(start := Adapter.load(run.init_from)):
                self.sets[name] = _kept(name, start)  # its head comes along, so its labels do
                self.texts |= texts_of_adapters({name: start})
        loaded = dict(self.sets)
        scored = [] if config.adapters else [*loaded.values(), *([self.own] if self.own is not None else [])]

        def one(name: str, train: Source | None, val: Source | None) -> PreparedTexts:
            prepared = prepare_texts(
                config.data,
                config.classification,
                self.processor,
                seed=config.seed,
                train=train,
                val=val,
                max_length=positions(self.model),
                known=[loaded[name]] if name in loaded else scored if loaded else [],
                names=None if self.own is None else self.own.names,
                progress=progress,
            )
            found[id(prepared)] = prepared.labels
            return prepared

        sets = read_sets(config, rows, one)
        for name in adapter_runs(config) if config.adapters or not loaded else ():
            self.sets.setdefault(name, found[id(sets.by_adapter[name])])
        self._compare_texts(config, sets)
        return sets

    def _compare_texts(self, config: TrainConfig, sets: DataSets[ClassRow]) -> None:
        """Keep how many texts a row each adapter learns from; rows to be scored are for all of them."""
        for name, own in sets.by_adapter.items():
            rows = own.train or own.test
            warn_of_texts({name: self.texts[name]} if name in self.texts else {} if config.adapters else self.texts, rows)
            if name in self.sets and (texts := texts_of_rows(own.train)):
                self.texts[name] = texts

    def preview(self, name: str, rows: Sequence[ClassRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        for row in rows:
            texts = "a text" if row.source.pair is None else "two texts"
            cut = ", cut to max_length" if row.truncated else ""
            out.title(f"{row.origin}: {texts}, {counted(row.size, 'token')}{cut}; label: {row.reference}")
            out.tokens(row.input_ids, self.processor, learned=0)
        return {}

    def check(self, name: str, job: AdapterJob) -> None:
        kind = self.sets[name].kind
        self._check_kinds(self.config.eval, [kind, *(known.kind for known in self.sets.values())])
        best = self.config.eval.best
        if best in METRICS and kind not in METRICS[best][1]:
            have = ", ".join(metric for metric, (_, having) in METRICS.items() if kind in having)
            raise ConfigError(f"eval.best: {best} isn't a score of adapter {name!r}, whose labels are {kind}: loss, {have}")

        saved = job.run.modules_to_save
        if saved is not None and not saved and self.labels(name) is not None:
            own = "that has no names of labels" if self.own is None else f"whose labels are {shown(self.own.names)}"
            raise ConfigError(
                Setting(f"adapters.{name}.modules_to_save"),
                f": [] keeps the model's own head, {own}, and the rows have {shown(self.sets[name].names)}. Leave it out.",
            )

    def batch(
        self, rows: Sequence[Sequence[ClassRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        longest = max(row.size for row in flat)
        ids = torch.full((len(flat), longest), self.pad_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(flat):
            ids[i, : row.size] = torch.tensor(row.input_ids)
            mask[i, : row.size] = 1
            if row.token_type_ids is not None:
                types[i, : row.size] = torch.tensor(row.token_type_ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._segments and any(row.token_type_ids is not None for row in flat):
            inputs["token_type_ids"] = types
        labels = [(self.labels_of(route), row.label) for row, route in zip(flat, routes, strict=True)]
        return ModelBatch(
            inputs=inputs,
            targets=targets_of(labels, self.width),
            loss=row_losses,
            routes=tuple(routes),
            weights=(1.0,) * len(flat),
            sizes=tuple(row.size for row in flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    @property
    def width(self) -> int:
        """Outputs of the widest head, the base's among them."""
        config: Any = self.model.config
        return max([config.num_labels, *(known.outputs for known in self.sets.values())])

    def labels_of(self, route: RowRoute) -> LabelSet:
        """The labels of a row's adapter, or of the base's own head."""
        if isinstance(route, str):
            return self.sets[route]
        if self.own is None:
            raise ConfigError(
                f"{type(self.model).__name__}: the base's own head was never trained (its labels have no names), so it says "
                "nothing of a text. Name adapters alone."
            )
        return self.own

    def missing_labels(self, name: str, rows: Sequence[ClassRow]) -> Sequence[str]:
        known = self.sets[name]
        there = {label for row in rows for label in names_in(row.label)}
        return [] if known.kind == REGRESSION else [label for label in known.names if label not in there]

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def labels(self, adapter: str) -> int | None:
        return None if self.sets[adapter] == self.own else self.sets[adapter].outputs

    def about(self, adapter: str) -> Mapping[str, str]:
        known = self.sets[adapter]
        texts = {TEXTS_KEY: self.texts[adapter]} if adapter in self.texts else {}
        return {LABELS_KEY: json.dumps(list(known.names), ensure_ascii=False), KIND_KEY: known.kind, **texts}

    @property
    def loss_unit(self) -> str:
        units = {SINGLE: "nats a text", MULTI: "nats a label", REGRESSION: "squared error"}
        return " or ".join(dict.fromkeys(units[known.kind] for known in self.sets.values()))

    @property
    def scores_base(self) -> bool:
        return self.own is not None and all(known == self.own for known in self.sets.values())

    def engine(self, bank: AdapterBank) -> Engine:
        made = super().engine(bank)
        made.one_route = has_one_input(self.model)
        return made

    # ---- scores -----------------------------------------------------------------------------------------------------

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return list(METRICS)

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[ClassRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        return {name: self._scores(outcome, config) for name, outcome in self.outcomes(engine, rows, config, busy).items()}

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[ClassRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        """Raises ConfigError for metrics that none of the labels has: others in their place would mislead."""
        kinds = {known.kind for known in (*self.sets.values(), *(self.labels_of(route_of(name)) for name in rows))}
        self._check_kinds(config, kinds)
        few = {name: spread(own, config.max_rows) for name, own in rows.items()}
        return self.validate(engine, few, config=config, busy=busy)

    @staticmethod
    def _check_kinds(config: EvalConfig, kinds: Collection[str]) -> None:
        for metric in (metric for asked in config.metrics for metric in expanded(asked)):
            if metric in METRICS and not set(kinds) & set(METRICS[metric][1]):
                check_metrics([metric], next(iter(kinds)))

    def _scores(self, outcome: Outcome, config: EvalConfig) -> dict[str, float]:
        targets = np.array([outcome.labels.target(row.label) for row in outcome.rows if row.label is not None], dtype=np.float64)
        scored = Scored(labels=outcome.labels, targets=targets, predictions=predicted(outcome.outputs_NK, outcome.labels))
        names = metrics_of(config.metrics, outcome.labels.kind)
        best = [config.best] if config.best in METRICS and config.best not in names else []
        return {"loss": float(outcome.losses_N.mean()), **compute(scored, [*names, *best])}

    def outcomes(
        self, engine: Engine, rows: Mapping[str, Sequence[ClassRow]], config: EvalConfig, busy: Busy
    ) -> dict[str, Outcome]:
        """Each name's outputs for its rows, all names in common passes; rows keep their order."""
        for name, own in rows.items():
            self._check_labels(name, own)
        jobs = [(name, i, row) for name, own in rows.items() for i, row in enumerate(own)]
        jobs.sort(key=lambda job: job[2].size)
        outputs = {name: np.zeros((len(own), self.width)) for name, own in rows.items()}
        losses = {name: np.zeros(len(own)) for name, own in rows.items()}
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            logits, found = self.outputs(engine, [(name, row) for name, _, row in part])
            for (name, i, _), values, loss in zip(part, logits.double().numpy(), found.double().tolist(), strict=True):
                outputs[name][i], losses[name][i] = values, loss
            busy("scoring", min(start + config.batch_size, len(jobs)), len(jobs))
        known = {name: self.labels_of(route_of(name)) for name in rows}
        return {
            name: Outcome(labels=known[name], rows=own, outputs_NK=outputs[name][:, : known[name].outputs], losses_N=losses[name])
            for name, own in rows.items()
            if own
        }

    def outputs(self, engine: Engine, jobs: Sequence[tuple[str, ClassRow]]) -> tuple[Tensor, Tensor]:
        """Logits (N, K) of rows for a name each, −inf where its head ends, and losses (N,), fp32 on the host."""
        count = len(jobs)
        batch = self.batch(
            [[row] for _, row in jobs], [route_of(name) for name, _ in jobs], examples=range(count), draws=[0] * count
        )

        def whole(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
            logits = outputs_of(model, inputs)
            return nn.functional.pad(logits, (0, self.width - logits.shape[1]), value=-torch.inf)

        logits = infer(engine, batch, whole).cpu()
        return logits, losses_of(logits, batch.targets)

    def _check_labels(self, name: str, rows: Sequence[ClassRow]) -> None:
        """Rows of several adapters' labels are read together for `eval`: each must be one of this one's."""
        known = self.labels_of(route_of(name))
        for row in rows:
            try:
                if row.label is not None:
                    known.target(row.label)
            except RowError as error:
                whose = "the base" if is_base(name) else f"adapter {name!r}"
                raise DataError(
                    f"{row.origin}: {error.reason}; that is {whose}. Score the adapters of these labels alone (--adapters)."
                ) from error

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[ClassRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        found = self.outcomes(engine, rows, config, busy) if config.samples else {}
        if not found:
            return
        pages = [page(name, outcome, self._scores(outcome, config)) for name, outcome in found.items()]
        write_files(folder, {"samples.md": "\n".join(pages)})
        for name, outcome in found.items():
            picture(outcome, f"{name}: {counted(len(outcome.rows), 'held-out row')}", folder / name / "held_out.png")

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return predict_rows(self, engine, wanted, busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="label rows of your own:", asks=[Ask(data="rows.jsonl", output="labels.jsonl")])


def _knows(adapter: Adapter) -> bool:
    """Whether it has labels of this task: what another's are means nothing here."""
    return LABELS_KEY in adapter.metadata and adapter.metadata.get(TASK_KEY, TextClassification.name) == TextClassification.name


def _kept(name: str, adapter: Adapter) -> LabelSet:
    values = {"labels": json.loads(adapter.metadata[LABELS_KEY]), "kind": adapter.metadata.get(KIND_KEY)}
    return LabelSet.from_dict(values, f"adapter {name!r}: the labels in its lorabank.json")


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> TextClassification:
    return TextClassification(config, model, processor, adapters)


KIND = TaskKind(load=load_classifier, open=_open, check_metrics=check_metrics, check_output=check_json_lines)
