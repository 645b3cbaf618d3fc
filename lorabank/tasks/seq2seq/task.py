"""`Text2Text`: an encoder-decoder under the bank. Loss a target token; what adapters write is scored against references."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lorabank.bank.routing import RowRoute
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.answers import refuse_taken
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.data.row import RowError
from lorabank.data.row_report import Splits
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import row_losses as losses_of_batch
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.tasks.asked import check_json_lines, cut_note, rows_asked
from lorabank.tasks.seq2seq.kept import KEPT
from lorabank.tasks.seq2seq.model import (
    IGNORED,
    Manner,
    beginning,
    check_encoder_decoder,
    decoder_inputs,
    load_seq2seq,
    positions,
    row_losses,
    set_languages,
    write,
)
from lorabank.tasks.seq2seq.pairs import Pair
from lorabank.tasks.seq2seq.rows import PairRow, encode_pairs, prepare_pairs, read_pairs
from lorabank.training.base_rows import BASE_NAME, base_rows
from lorabank.training.data_sets import DataSets, RowObjects, read_sets
from lorabank.training.evaluate import Generated, route_of, score_answers, spread
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.run_folder import write_samples
from lorabank.training.scorers import LOSS_METRICS, check_metrics, split_metrics
from lorabank.training.task import Busy, Draws, Prediction, Task, TaskKind
from lorabank.wording import counted

IN_TRAINING = 32
"""Different sources that are written for at each validation, unless `eval.max_prompts` says otherwise."""


class Text2Text(Task[PairRow]):
    """Of one encoder-decoder."""

    name = "text2text-generation"
    unit = "tokens"
    section = "seq2seq"
    prefix_key: ClassVar[str | None] = None
    """Where a configuration's `task_specific_params` has this task's prefix."""

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, processor)
        self.seq2seq = check_encoder_decoder(model)
        self.settings: Seq2SeqConfig = KEPT.merged(config.seq2seq, loaded)
        set_languages(processor, self.settings)
        self.begin = beginning(self.seq2seq, processor)

    # ---- rows -------------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """Text before every source."""
        if self.settings.prefix is not None:
            return self.settings.prefix
        known: Any = getattr(self.seq2seq.config, "task_specific_params", None) or {}
        own = known.get(self.params_key() or "", {})
        return str(own.get("prefix") or "")

    def params_key(self) -> str | None:
        """Of `task_specific_params`."""
        return self.prefix_key

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[PairRow]:
        def one(_name: str, train: Source | None, val: Source | None) -> Splits[PairRow]:
            return prepare_pairs(
                config.data,
                self.settings,
                self.processor,
                seed=config.seed,
                prefix=self.prefix,
                train=train,
                val=val,
                longest=positions(self.seq2seq),
                progress=progress,
            )

        return read_sets(config, rows, one)

    def preview(self, name: str, rows: Sequence[PairRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        out.legend()
        for row in rows:
            read = f"{counted(len(row.input_ids), 'token')} read{' (cut to max_length)' if 'source' in row.cut else ''}"
            cut = " (cut to seq2seq.max_target_length)" if "target" in row.cut else ""
            out.title(f"{row.origin}: {read}, {len(row.target_ids)} trained{cut}")
            out.tokens(row.input_ids, self.processor, learned=0, name="source")
            out.tokens(row.target_ids, self.processor, name="target")
        return {}

    def batch(
        self, rows: Sequence[Sequence[PairRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        source, target = max(len(row.input_ids) for row in flat), max(len(row.target_ids) for row in flat)
        ids = torch.full((len(flat), source), int(self.seq2seq.config.pad_token_id or 0))
        mask, labels = torch.zeros_like(ids), torch.full((len(flat), target), IGNORED)
        for i, row in enumerate(flat):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            mask[i, : len(row.input_ids)] = 1
            labels[i, : len(row.target_ids)] = torch.tensor(row.target_ids)
        return ModelBatch(
            inputs={"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_inputs(self.seq2seq, labels)},
            targets={"labels": labels},
            loss=row_losses,
            routes=tuple(routes),
            weights=tuple(float(len(row.target_ids)) for row in flat),
            sizes=tuple(row.size for row in flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        return "nats a target token"

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        from_loss, scorers = split_metrics(config.metrics)
        parts = {"rouge": ("rouge1", "rouge2", "rougeL")}
        return [*from_loss, *(part for name in scorers for part in parts.get(name, (name.rpartition(":")[2],)))]

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[PairRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        return self._scores(engine, rows, config, config.max_prompts or IN_TRAINING, busy)

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[PairRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        return self._scores(engine, rows, config, config.max_prompts, busy)

    def _scores(
        self, engine: Engine, rows: Mapping[str, Sequence[PairRow]], config: EvalConfig, prompts: int | None, busy: Busy
    ) -> dict[str, dict[str, float]]:
        losses = self._losses(engine, {name: spread(own, config.max_rows) for name, own in rows.items()}, config, busy)
        from_loss, scorers = split_metrics(config.metrics)
        found = {name: {"loss": loss, **{m: LOSS_METRICS[m](loss) for m in from_loss}} for name, loss in losses.items()}
        for names in _alike(rows) if scorers else ():
            written = unique_sources(rows[names[0]], prompts)
            self._write(engine, written, names, config, busy)
            for name, scores in score_answers([generated for _, generated in written], names, config.metrics).items():
                found[name] |= scores
        return found

    def _losses(self, engine: Engine, rows: Mapping[str, Sequence[PairRow]], config: EvalConfig, busy: Busy) -> dict[str, float]:
        """Mean −log p a target token, nats, of each name on its rows."""
        jobs = sorted(((name, row) for name, own in rows.items() for row in own), key=lambda job: job[1].size)
        sums, tokens = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0)
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            batch = self.batch(
                [[row] for _, row in part], [route_of(name) for name, _ in part], examples=range(len(part)), draws=[0] * len(part)
            )
            for (name, row), loss in zip(part, losses_of_batch(engine, batch).double().tolist(), strict=True):
                sums[name] += loss
                tokens[name] += len(row.target_ids)
            busy("scoring", min(start + config.batch_size, len(jobs)), len(jobs))
        return {name: sums[name] / max(1, tokens[name]) for name, own in rows.items() if own}

    def _write(
        self,
        engine: Engine,
        sources: Sequence[tuple[PairRow, Generated]],
        names: Sequence[str],
        config: EvalConfig,
        busy: Busy,
    ) -> None:
        """Fill in what every name writes for every source, all of them in the same passes."""
        jobs = sorted(((name, row, into) for row, into in sources for name in names), key=lambda job: len(job[1].input_ids))
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            texts = self._texts(engine, [(name, row) for name, row, _ in part], config.max_new_tokens)
            for (name, _, into), text in zip(part, texts, strict=True):
                into.answers[name] = text
            busy("writing", min(start + config.batch_size, len(jobs)), len(jobs))

    @property
    def manner(self) -> Manner:
        """How the run's settings say that texts are looked for."""
        own = self.settings
        return Manner(beams=own.beams, length_penalty=own.length_penalty, no_repeat_ngram_size=own.no_repeat_ngram_size)

    def _texts(
        self, engine: Engine, jobs: Sequence[tuple[str, PairRow]], max_new_tokens: int, manner: Manner | None = None
    ) -> list[str]:
        return write(
            engine.bank,
            self.processor,
            [row.input_ids for _, row in jobs],
            [route_of(name) for name, _ in jobs],
            begin=self.begin,
            manner=manner or self.manner,
            max_new_tokens=max_new_tokens,
        )

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[PairRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        every = [row for own in base_rows(rows).values() for row in own]
        sources = unique_sources(every, config.samples) if config.samples else []
        if sources:
            self._write(engine, sources, [BASE_NAME, *rows], config, busy)
            write_samples(folder, [generated for _, generated in sources])

    def about(self, adapter: str) -> Mapping[str, str]:
        return KEPT.as_metadata(self.settings)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        config = self.config
        check_json_lines(wanted.output)
        rows = rows_asked(wanted.data, wanted.max_rows, column=self.settings.source or "text")
        refuse_taken(rows, wanted.names)
        pairs, _ = read_pairs(rows, config.data, self.settings, need_target=False)
        readable = [(i, pair) for i, pair in enumerate(pairs) if isinstance(pair, Pair)]
        coded = encode_pairs(
            [pair for _, pair in readable],
            config.data,
            self.settings,
            self.processor,
            prefix=self.prefix,
            longest=positions(self.seq2seq),
        )
        texts: list[dict[str, Any]] = [
            {**dict.fromkeys(wanted.names), "unread": pair.reason} if isinstance(pair, RowError) else {} for pair in pairs
        ]
        jobs = [(i, name, row) for (i, _), row in zip(readable, coded, strict=True) for name in wanted.names]
        jobs.sort(key=lambda job: len(job[2].input_ids))
        longest = int(wanted.options.get("max_new_tokens") or config.eval.max_new_tokens)
        manner = replace(self.manner, beams=int(wanted.options.get("beams") or self.manner.beams))
        for start in range(0, len(jobs), wanted.batch_size):
            part = jobs[start : start + wanted.batch_size]
            found = self._texts(engine, [(name, row) for _, name, row in part], longest, manner)
            for (i, name, _), text in zip(part, found, strict=True):
                texts[i][name] = text
            busy("writing", min(start + wanted.batch_size, len(jobs)), len(jobs))
        lines = []
        for row, mine in zip(rows, texts, strict=True):
            ordered = {name: mine[name] for name in wanted.names} | mine
            lines.append(json.dumps({**row.values, **ordered}, ensure_ascii=False, default=str) + "\n")
        write_files(wanted.output.parent, {wanted.output.name: "".join(lines)})
        unread = len(rows) - len(readable)
        left = f", {unread} of them unread (column 'unread')" if unread else ""
        cut = [row for row in coded if "source" in row.cut]
        note = cut_note((row.origin for row in cut), len(cut[0].input_ids) if cut else 0)
        return f"{counted(len(rows), 'row')}{left}, written by {', '.join(wanted.names)}: {wanted.output}{note}"

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="write for rows of your own:", asks=[Ask(data="rows.jsonl", output="written.jsonl")])


def unique_sources(rows: Sequence[PairRow], limit: int | None = None) -> list[tuple[PairRow, Generated]]:
    """Each source once, with all its references, at most `limit` of them spread evenly."""
    found: dict[tuple[int, ...], tuple[PairRow, dict[str, None]]] = {}
    for row in rows:
        found.setdefault(row.input_ids, (row, {}))[1][row.reference] = None
    every = [(row, Generated(prompt=row.prompt_text, references=tuple(references))) for row, references in found.values()]
    return list(spread(every, limit))


def _alike(rows: Mapping[str, Sequence[PairRow]]) -> list[list[str]]:
    """Names that have the same rows, which are written for once."""
    groups: dict[int, list[str]] = {}
    for name, own in rows.items():
        if own:
            groups.setdefault(id(own), []).append(name)
    return list(groups.values())


class Summarization(Text2Text):
    """Texts and their summaries."""

    name = "summarization"
    prefix_key = "summarization"


class Translation(Text2Text):
    """Texts of one language and of another."""

    name = "translation"

    def params_key(self) -> str | None:
        langs = self.settings
        return f"translation_{langs.source_lang}_to_{langs.target_lang}"


def kind_of(task: type[Text2Text]) -> TaskKind:
    """The entry of the table of tasks for one of these."""

    def opened(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> Text2Text:
        return task(config, model, processor, adapters)

    return TaskKind(load=load_seq2seq, open=opened, check_metrics=check_metrics, check_output=check_json_lines)
