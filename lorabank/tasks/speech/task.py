"""`SpeechRecognition`: Whisper under the bank. Adapters for speakers, accents, languages or words, in all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lorabank.bank.routing import RowRoute
from lorabank.config.speech import SpeechConfig
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.data.reasons import MAX_ORIGINS
from lorabank.data.row_report import Splits
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import row_losses
from lorabank.errors import ConfigError, DataError, ModelError, Setting
from lorabank.formats.adapter import Adapter
from lorabank.models.image_processors import settings_file
from lorabank.models.load_class import load_class
from lorabank.tasks.speech.hearing import Hearing
from lorabank.tasks.speech.loading import processor_of
from lorabank.tasks.speech.masking import masked
from lorabank.tasks.speech.predict import check_output, predict
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.speech.preview import preview
from lorabank.tasks.speech.rows import SpeechRow
from lorabank.tasks.speech.scores import METRICS, check_metrics, error_rates
from lorabank.tasks.speech.teaching import label_tensors, transcript_loss
from lorabank.tasks.speech.tokens import speech_tokens
from lorabank.tasks.speech.transcribe import Heard, Manner, transcribe
from lorabank.tasks.speech.transcripts import plain_text, with_times
from lorabank.training.base_rows import BASE_NAME, base_rows
from lorabank.training.data_sets import DataSets, RowObjects, read_sets
from lorabank.training.evaluate import Generated, route_of, spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.processors import ProcessorKind
from lorabank.training.run_folder import write_samples
from lorabank.training.task import BaseRequest, Busy, Draws, Prediction, Say, Task, TaskBase, TaskKind

SPEECH_KEY = "speech"
"""Of an adapter's metadata: the settings that it was trained with, as JSON; it is used with them again."""
SHOWN = 40
"""Characters of a transcript that a message repeats."""
KEPT_SETTINGS = ("language", "task", "timestamps", "window", "beams")


class SpeechRecognition(Task[SpeechRow]):
    """Of one Whisper model."""

    name = "automatic-speech-recognition"
    unit = "seconds of audio"
    section = "speech"

    def __init__(self, config: TrainConfig, model: Any, processor: Any, speech: SpeechConfig) -> None:
        super().__init__(config, model, processor)
        _check_whisper(model)
        self.tokens = speech_tokens(processor.tokenizer, model, speech)
        self.hearing = Hearing(processor.feature_extractor, model, speech.window)
        self.speech = replace(speech, window=self.hearing.window)
        if speech.mask_feature_prob and speech.mask_feature_length > (bins := processor.feature_extractor.feature_size):
            raise ConfigError(
                Setting("speech.mask_feature_length"), f": at most this model's {bins} Mel bins, got {speech.mask_feature_length}"
            )

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[SpeechRow]:
        def one(_name: str, train: Source | None, val: Source | None) -> Splits[SpeechRow]:
            return prepare_speech(
                config.data,
                self.speech,
                self.tokens,
                self.hearing.rate,
                seed=config.seed,
                train=train,
                val=val,
                progress=progress,
            )

        return read_sets(config, rows, one)

    def preview(self, name: str, rows: Sequence[SpeechRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        return preview(self, rows, out)

    def batch(
        self, rows: Sequence[Sequence[SpeechRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        labels, targets = label_tensors(flat, self.tokens.end, self.tokens.longest)
        features = self.hearing.remembered([(row.digest, row.samples) for row in flat], self.device)
        if any(draws) and (self.speech.mask_time_prob or self.speech.mask_feature_prob):
            features = masked(features, [self.hearing.frames_of(row.seconds) for row in flat], draws, self.speech)
        return ModelBatch(
            inputs={"input_features": features, **labels},
            targets=targets,
            loss=transcript_loss,
            routes=tuple(routes),
            weights=tuple(float(row.tokens) for row in flat),
            sizes=(max(1, round(self.hearing.window)),) * len(flat),  # each is filled up to the window
            examples_E=torch.as_tensor(list(examples)),
        )

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    def check(self, name: str, job: AdapterJob) -> None:
        if job.run.init == "eva" and self.hearing.frames != self.hearing.whole_frames:
            raise ConfigError(f"adapters.{name}.init: eva needs the model's whole window. Leave speech.window out.")
        said = spread([row for row in job.val if isinstance(row, SpeechRow)], self.config.eval.max_prompts)
        if said:
            try:
                self._rates(said, [row.text for row in said])
            except DataError as error:
                raise DataError(
                    f"validation rows of {job.data}: {error} Set ",
                    Setting("data.val"),
                    " to rows with words, or ",
                    Setting("data.val_split"),
                    " to 0, which scores none.",
                ) from error

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def about(self, adapter: str) -> Mapping[str, str]:
        return {SPEECH_KEY: json.dumps({name: getattr(self.speech, name) for name in KEPT_SETTINGS})}

    # ---- scores -----------------------------------------------------------------------------------------------------

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        check_metrics(config.metrics)
        return METRICS

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[SpeechRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        found = self._losses(engine, rows, config, busy)
        chosen = {name: spread(rows[name], config.max_prompts) for name in found}
        heard = self._transcripts(engine, chosen, config, busy, "transcribing")
        return {name: {"loss": loss, **self._rates(chosen[name], heard[name])} for name, loss in found.items()}

    def _rates(self, rows: Sequence[SpeechRow], heard: Sequence[str]) -> dict[str, float]:
        try:
            return error_rates([row.text for row in rows], heard, [row.language for row in rows], self._spelling)
        except DataError as error:
            some = ", ".join(f"{row.origin} {row.text[:SHOWN]!r}" for row in rows[:MAX_ORIGINS])
            raise DataError(f"{error} ({some}{', …' if len(rows) > MAX_ORIGINS else ''}).") from error

    @property
    def _spelling(self) -> Mapping[str, str] | None:
        """British to American words, where the tokenizer came with Whisper's normalizer.json."""
        return self.processor.tokenizer.english_spelling_normalizer

    def _losses(
        self, engine: Engine, rows: Mapping[str, Sequence[SpeechRow]], config: EvalConfig, busy: Busy
    ) -> dict[str, float]:
        """Mean −log p a learned token, nats, of each name."""
        jobs = sorted(((name, row) for name, own in rows.items() for row in own), key=lambda job: len(job[1].labels))
        sums, counts = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0)
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            numbers = range(len(part))
            routes = [route_of(name) for name, _ in part]
            batch = self.batch([[row] for _, row in part], routes, examples=numbers, draws=[0] * len(part))
            for (name, row), loss in zip(part, row_losses(engine, batch).double().tolist(), strict=True):
                sums[name] += loss
                counts[name] += row.tokens
            busy("scoring", min(start + config.batch_size, len(jobs)), len(jobs))
        return {name: sums[name] / counts[name] for name in rows if counts[name]}

    def _transcripts(
        self,
        engine: Engine,
        rows: Mapping[str, Sequence[SpeechRow]],
        config: EvalConfig,
        busy: Busy,
        activity: str,
        *,
        timed: bool = False,
    ) -> dict[str, list[str]]:
        """What each name hears in its rows: words alone, or with times where the row has them."""
        jobs = [
            Heard(
                key=row.digest,
                samples=row.samples,
                seconds=row.seconds,
                route=route_of(name),
                language=row.spoken,
                timestamps=row.timed,
            )
            for name, own in rows.items()
            for row in own
        ]
        manner = Manner(
            task=self.speech.task,
            beams=self.speech.beams,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        told: Callable[[int, int], None] = lambda done, total: busy(activity, done, total)  # noqa: E731
        found = iter(transcribe(engine, self.hearing, self.tokens, jobs, manner, told))
        write = with_times if timed else plain_text
        return {name: [write(next(found)) for _ in own] for name, own in rows.items()}

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[SpeechRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        every = [row for own in base_rows(rows).values() for row in own]
        shown = list(spread(every, config.samples)) if config.samples else []
        if not shown:
            return
        names = [BASE_NAME, *rows]
        heard = self._transcripts(engine, dict.fromkeys(names, shown), config, busy, "samples", timed=True)
        told = [
            Generated(prompt=row.prompt_text, references=(row.reference,), answers={name: heard[name][i] for name in names})
            for i, row in enumerate(shown)
        ]
        write_samples(folder, told)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return predict(engine, self.hearing, self.tokens, self.config, wanted, busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        asks = [Ask(data="recordings/", output="transcripts.jsonl")]
        return NextSteps(title="transcribe recordings of your own:", asks=asks)


def _check_whisper(model: Any) -> None:
    """Raise ModelError for a model that isn't Whisper's."""
    from transformers import WhisperForConditionalGeneration

    if not isinstance(model, WhisperForConditionalGeneration):
        raise ModelError(f"speech recognition is for Whisper models so far, and this is a {type(model).__name__}.")


def _load(request: BaseRequest, say: Say) -> TaskBase:
    from transformers import AutoModelForSpeechSeq2Seq

    base = load_class(
        request.model,
        AutoModelForSpeechSeq2Seq,
        processor_of,
        dtype=request.dtype,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        say=say,
    )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> SpeechRecognition:
    return SpeechRecognition(config, model, processor, _settings(config, adapters))


def _settings(config: TrainConfig, adapters: Mapping[str, Adapter]) -> SpeechConfig:
    """The run's settings; without any those that its adapters were trained with. Raises ConfigError where these differ."""
    said = {name: adapter.metadata[SPEECH_KEY] for name, adapter in adapters.items() if SPEECH_KEY in adapter.metadata}
    if config.speech != SpeechConfig() or not said:
        return config.speech
    if len(set(said.values())) > 1:
        raise ConfigError(Setting("speech"), f": the adapters were trained with other settings each ({said}). Name those of one.")
    return SpeechConfig(**{**asdict(config.speech), **json.loads(next(iter(said.values())))})


def _is_whisper(given: object) -> bool:
    from transformers import WhisperProcessor

    return isinstance(given, WhisperProcessor)


def _beside(folder: Path) -> Any:
    """Of an adapter; a folder with one of its files has both."""
    there = (folder / "tokenizer_config.json").is_file() and settings_file(folder, "feature_extractor") is not None
    return processor_of(str(folder), folder) if there else None


PROCESSOR = ProcessorKind(
    expected="a WhisperProcessor, which is a feature extractor and a tokenizer (WhisperProcessor.from_pretrained(…))",
    accepts=_is_whisper,
    beside=_beside,
)
KIND = TaskKind(load=_load, open=_open, check_metrics=check_metrics, processor=PROCESSOR, check_output=check_output)
