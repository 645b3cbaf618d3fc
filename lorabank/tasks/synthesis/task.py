"""`SpeechSynthesis`: SpeechT5 under the bank; an adapter a voice, or a way of speaking."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.bank.targets import resolve_targets
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.data.row_report import Splits
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import infer
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import ConfigError, ModelError, Setting, first_line
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.models.image_processors import settings_file
from lorabank.models.load_class import load_class
from lorabank.tasks.speech.audio import as_wav
from lorabank.tasks.synthesis.kept import KEPT, kept
from lorabank.tasks.synthesis.loss import DRAWS, FRAMES, MEL, TOKENS, loss_and_error, synthesis_loss
from lorabank.tasks.synthesis.predict import check_output, predict
from lorabank.tasks.synthesis.preview import preview
from lorabank.tasks.synthesis.rows import Limits, SynthesisRow, prepare
from lorabank.tasks.synthesis.vocoder import griffin_lim, load_vocoder
from lorabank.training.base_rows import BASE_NAME
from lorabank.training.data_sets import DataSets, RowObjects, read_sets
from lorabank.training.evaluate import route_of, spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.markdown import cell
from lorabank.training.next_steps import Ask, NextSteps
from lorabank.training.processors import ProcessorKind
from lorabank.training.scorers import check_among
from lorabank.training.task import BaseRequest, Busy, Draws, Prediction, Say, Task, TaskBase, TaskKind

METRICS = ("loss", "mae")
POSTNET = "speech_decoder_postnet.layers."
"""Where layers are whose input is one row's frames at a time."""


class SpeechSynthesis(Task[SynthesisRow]):
    """Of one SpeechT5."""

    name = "text-to-speech"
    unit = "seconds of audio"
    section = "synthesis"

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, processor)
        from transformers import SpeechT5ForTextToSpeech

        if not isinstance(model, SpeechT5ForTextToSpeech):
            raise ConfigError(f"text-to-speech: expected a SpeechT5ForTextToSpeech, got a {type(model).__name__}")
        for part in ("tokenizer", "feature_extractor"):
            if getattr(processor, part, None) is None:
                raise ConfigError(f"text-to-speech: the processor has no {part}. Give a SpeechT5Processor.")
        known = model.config
        self.limits = Limits(speaker=known.speaker_embedding_dim, text=known.max_text_positions, reduction=known.reduction_factor)
        device = next(model.parameters()).device
        self.settings: SynthesisConfig = KEPT.merged(config.synthesis, loaded)
        self._vocoder = self._load_vocoder(device)

    def _load_vocoder(self, device: torch.device) -> Any:
        """None for Griffin-Lim: where none is asked for, or (with a warning) the adapter's isn't on this machine."""
        vocoder = self.settings.vocoder
        if vocoder is None:
            return None
        try:
            return load_vocoder(vocoder, device)
        except ModelError as error:
            if vocoder == self.config.synthesis.vocoder:
                raise
            warnings.warn(f"{error} The adapter was trained with it. Griffin-Lim, which sounds metallic, is used.", stacklevel=4)
            return None

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.processor.feature_extractor.sampling_rate)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(
        self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None
    ) -> DataSets[SynthesisRow]:
        def one(_name: str, train: Source | None, val: Source | None) -> Splits[SynthesisRow]:
            return prepare(
                config.data,
                self.settings,
                self.processor,
                self.limits,
                seed=config.seed,
                train=train,
                val=val,
                progress=progress,
            )

        return read_sets(config, rows, one)

    def preview(self, name: str, rows: Sequence[SynthesisRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        return preview(self, rows, out)

    def batch(
        self, rows: Sequence[Sequence[SynthesisRow]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> ModelBatch:
        flat = [row for (row,) in rows]
        longest, frames = max(len(row.input_ids) for row in flat), max(row.frames for row in flat)
        ids = torch.full((len(flat), longest), int(self.processor.tokenizer.pad_token_id or 0))
        mask = torch.zeros(len(flat), longest, dtype=torch.int64)
        mel = torch.zeros(len(flat), frames, flat[0].mel_TM.shape[1])
        for i, row in enumerate(flat):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            mask[i, : len(row.input_ids)] = 1
            mel[i, : row.frames] = torch.from_numpy(np.ascontiguousarray(row.mel_TM))
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        seeds = [draw or _own_seed(row) for draw, row in zip(draws, flat, strict=True)]
        return ModelBatch(
            inputs={
                "input_ids": ids,
                "attention_mask": mask,
                "speaker_embeddings": torch.tensor([row.speaker for row in flat]).to(dtype),
            },
            targets={
                MEL: mel,
                FRAMES: torch.tensor([row.frames for row in flat]),
                TOKENS: torch.tensor([len(row.input_ids) for row in flat]),
                DRAWS: torch.tensor(seeds),
            },
            loss=synthesis_loss,
            routes=tuple(routes),
            weights=tuple(float(row.frames) for row in flat),
            sizes=tuple(row.frames for row in flat),
            examples_E=torch.as_tensor(list(examples)),
        )

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def about(self, adapter: str) -> Mapping[str, str]:
        return kept(self.settings)

    def check(self, name: str, job: AdapterJob) -> None:
        chosen = resolve_targets(self.model, job.run.adapter_config())
        if inside := next((path for path in chosen if path.startswith(POSTNET)), None):
            raise ConfigError(
                Setting(f"adapters.{name}.targets"),
                f": layer {inside!r} is in the postnet, which gets one row's frames at a time, so rows of several adapters can't "
                f"be told apart there. exclude: ['{POSTNET}*'].",
            )

    def engine(self, bank: AdapterBank) -> Engine:
        """Frames differ from row to row, and dropout is drawn on the host: no pass is captured."""
        return replace(super().engine(bank), cuda_graphs=False)

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        return "a frame"

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return METRICS[1:]

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[SynthesisRow]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        chosen = {name: spread(own, config.max_rows) for name, own in rows.items() if own}
        jobs = sorted(((name, row) for name, own in chosen.items() for row in own), key=lambda job: job[1].frames)
        sums = {name: [0.0, 0.0, 0.0] for name in chosen}
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            batch = self.batch(
                [[row] for _, row in part], [route_of(name) for name, _ in part], examples=range(len(part)), draws=[0] * len(part)
            )
            for (name, row), (loss, error) in zip(part, infer(engine, batch, loss_and_error).tolist(), strict=True):
                sums[name][0] += loss
                sums[name][1] += error * row.frames
                sums[name][2] += row.frames
            busy("scoring", min(start + config.batch_size, len(jobs)), len(jobs))
        return {name: {"loss": loss / count, "mae": error / count} for name, (loss, error, count) in sums.items()}

    def say(self, engine: Engine, name: str, row: SynthesisRow) -> np.ndarray:
        """Samples (S,) of a text said by an adapter, or the base; alone, and the same each time."""
        model: Any = engine.bank.model
        ids = torch.tensor([row.input_ids], device=engine.bank.device)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        speaker = torch.tensor([row.speaker], device=engine.bank.device, dtype=dtype)
        with torch.random.fork_rng(), evaluation_mode(model.modules()), engine.bank.route([route_of(name)]), torch.no_grad():
            torch.manual_seed(_own_seed(row) % 2**31)  # its prenet drops out at all times
            mel = model.generate(
                ids, attention_mask=torch.ones_like(ids), speaker_embeddings=speaker, threshold=self.settings.stop
            )
        return self._sound(mel)

    def _sound(self, mel_TM: torch.Tensor) -> np.ndarray:
        """Samples (S,) of a spectrum."""
        if self._vocoder is None:
            return griffin_lim(mel_TM.float().cpu(), self.processor.feature_extractor)
        with torch.no_grad():
            device = next(self._vocoder.parameters()).device
            return self._vocoder(mel_TM.float().to(device)).float().cpu().numpy().reshape(-1)

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[SynthesisRow]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        files: dict[str, bytes] = {}
        lines = ["# Samples", "", "| adapter's | base's | recording, through the same vocoder | text |", "|---|---|---|---|"]
        jobs = [(name, i, row) for name, own in rows.items() for i, row in enumerate(spread(own, config.samples), 1)]
        for done, (name, i, row) in enumerate(jobs, 1):
            own, base, real = (f"{name}-{i}{what}.wav" for what in ("", "-base", "-recording"))
            files[own] = as_wav(self.say(engine, name, row), self.rate)
            files[base] = as_wav(self.say(engine, BASE_NAME, row), self.rate)
            files[real] = as_wav(self._sound(torch.from_numpy(np.ascontiguousarray(row.mel_TM))), self.rate)
            lines.append(f"| samples/{own} | samples/{base} | samples/{real} | {cell(row.text)} |")
            busy("saying", done, len(jobs))
        if files:
            write_files(folder / "samples", files)
            write_files(folder, {"samples.md": "\n".join(lines) + "\n"})

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        return predict(self, engine, wanted, busy=busy)

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="say texts of your own:", asks=[Ask(data="texts.txt", output="said/")])


def _own_seed(row: SynthesisRow) -> int:
    return 1 + sum(map(ord, row.digest)) * 1_000_003 + len(row.input_ids)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that isn't one of synthesis."""
    check_among(metrics, METRICS)


def _processor_of(name: str, folder: Path) -> Any:
    from transformers import SpeechT5Processor

    try:
        return SpeechT5Processor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged or missing file surfaces as one of a dozen classes
        reason = first_line(error)
        raise ModelError(
            f"model {name!r}: its tokenizer or feature extractor can't be read ({reason}). Text-to-speech needs a SpeechT5 with "
            "preprocessor_config.json and spm_char.model beside its weights."
        ) from error


def _load(request: BaseRequest, say: Say) -> TaskBase:
    from transformers import AutoModelForTextToSpectrogram

    base = load_class(
        request.model,
        AutoModelForTextToSpectrogram,
        _processor_of,
        dtype=request.dtype,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        say=say,
    )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def _open(config: TrainConfig, model: Any, processor: Any, adapters: Mapping[str, Adapter]) -> SpeechSynthesis:
    return SpeechSynthesis(config, model, processor, adapters)


def _is_speecht5(given: object) -> bool:
    from transformers import SpeechT5Processor

    return isinstance(given, SpeechT5Processor)


def _beside(folder: Path) -> Any:
    """Of an adapter; a folder with one of its files has both."""
    there = (folder / "tokenizer_config.json").is_file() and settings_file(folder, "feature_extractor") is not None
    return _processor_of(str(folder), folder) if there else None


PROCESSOR = ProcessorKind(
    expected="a SpeechT5Processor, which is a feature extractor and a tokenizer (SpeechT5Processor.from_pretrained(…))",
    accepts=_is_speecht5,
    beside=_beside,
)
KIND = TaskKind(load=_load, open=_open, check_metrics=check_metrics, processor=PROCESSOR, check_output=check_output)
