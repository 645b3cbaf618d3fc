"""`text-generation`: causal language models. Rows of tokens with a weight each; answers are generated to be scored and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorabank.bank.routing import RowRoute
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import PreparedData, Progress, prepare
from lorabank.data.preview import Printer, preview
from lorabank.data.read import Source
from lorabank.data.render import TokenRow
from lorabank.engine.batch import Batch, pack_batch
from lorabank.engine.engine import Engine
from lorabank.engine.head import check_decoder
from lorabank.errors import DataError
from lorabank.formats.adapter import Adapter
from lorabank.models.load import load_base, load_tokenizer
from lorabank.tasks.answers import answer_rows
from lorabank.tasks.asked import check_json_lines
from lorabank.training.base_rows import BASE_NAME, base_rows
from lorabank.training.data_sets import DataSets, RowObjects, read_sets
from lorabank.training.evaluate import Generated, full_scores, generate_answers, unique_prompts, validation_losses
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.run_folder import write_samples
from lorabank.training.scorers import check_metrics, split_metrics
from lorabank.training.serving import chat_line
from lorabank.training.task import BaseRequest, Busy, Draws, Prediction, Say, Task, TaskBase, TaskKind


def read_rows(
    config: TrainConfig, tokenizer: Any, *, rows: RowObjects | None = None, progress: Progress | None = None
) -> DataSets[TokenRow]:
    """Read and tokenise every data set of the run once. `rows`: objects in place of `config.data`'s files."""

    def one(_name: str, train: Source | None, val: Source | None) -> PreparedData:
        return prepare(config.data, tokenizer, seed=config.seed, train=train, val=val, progress=progress)

    return read_sets(config, rows, one)


class TextGeneration(Task[TokenRow]):
    """Of one causal language model."""

    name = "text-generation"
    unit = "tokens"

    def __init__(self, config: TrainConfig, model: Any, processor: Any) -> None:
        super().__init__(config, model, processor)
        check_decoder(model)

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[TokenRow]:
        return read_rows(config, self.processor, rows=rows, progress=progress)

    def preview(self, name: str, rows: Sequence[TokenRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        preview(rows, self.processor, out.console, len(rows))
        return {}

    def batch(
        self, rows: Sequence[Sequence[TokenRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> Batch:
        return pack_batch([[row.example for row in packed] for packed in rows], routes, examples=examples)

    def check(self, name: str, job: AdapterJob) -> None:
        _, scorers = split_metrics(self.config.eval.metrics)
        if scorers and job.val and not unique_prompts(_tokens(job.val)):
            raise DataError(
                f"eval.metrics: {', '.join(scorers)} compare generated answers, and no validation row of {job.data} has a prompt "
                "and an answer. Use the metrics loss and perplexity."
            )

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return ()

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[TokenRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        losses = validation_losses(engine, rows, batch_size=config.batch_size, busy=busy)
        return {name: {"loss": loss} for name, loss in losses.items()}

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[TokenRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        return full_scores(engine, self.processor, rows, config=config, busy=busy)

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[TokenRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        every = [row for own in base_rows(rows).values() for row in own]
        prompts = unique_prompts(every, config.samples) if config.samples else []
        if not prompts:
            return
        generate_answers(
            engine,
            self.processor,
            prompts,
            [BASE_NAME, *rows],
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            busy=busy,
        )
        told: list[Generated] = [generated for _, generated in prompts]
        write_samples(folder, told)

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return answer_rows(engine, self.processor, self.config, wanted, busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(
            title="talk to them side by side:",
            commands=lambda run: [chat_line(run, [*names, BASE_NAME])],
            asks=[Ask(data="rows.jsonl", output="answers.jsonl")],
        )


def _tokens(rows: Sequence[Any]) -> Sequence[TokenRow]:
    return rows


def _load(request: BaseRequest, say: Say) -> TaskBase:
    base = load_base(
        request.model, dtype=request.dtype, device=request.device, trust_remote_code=request.trust_remote_code, say=say
    )
    return TaskBase(model=base.model, processor=base.tokenizer, name=base.name, folder=base.folder, notes=base.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> TextGeneration:
    return TextGeneration(config, model, processor)


def _load_tokenizer(request: BaseRequest, say: Say) -> TaskBase:
    tokenizer = load_tokenizer(request.model, trust_remote_code=request.trust_remote_code)
    return TaskBase(model=nn.Module(), processor=tokenizer, name=request.model, folder=None)


KIND = TaskKind(
    load=_load,
    open=_open,
    check_metrics=check_metrics,
    quantises=True,
    offloads=True,
    load_preview=_load_tokenizer,
    check_output=check_json_lines,
)
