"""Text from recordings by transformers' `generate`, rows of every adapter and of the base in the same batches.

A recording longer than the window is cut at its quietest moments, so that no word lies on a border.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lorabank.bank.routing import RowRoute
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.engine.modes import evaluation_mode
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.speech.hearing import Hearing, heard
from lorabank.tasks.speech.tokens import SpeechTokens
from lorabank.tasks.speech.transcripts import Segment

QUIET_S = 0.2
"""Stretch whose loudness is looked at when a place to cut is sought."""
SEARCHED = 1 / 3
"""Share of a window, at its end, in which the cut may lie."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One recording, or window of one, to be transcribed under one route."""

    samples: Callable[[], np.ndarray]
    """float32 samples (S,), at most a window; asked for when its batch comes."""
    key: str | None = None
    """Name under which its features are kept for later; None: not at all."""
    seconds: float
    route: RowRoute
    language: str | None
    timestamps: bool


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How text is generated."""

    task: str = "transcribe"
    beams: int = 1
    max_new_tokens: int = 128
    """Tokens of a window, at most; the decoder's positions limit it too."""
    batch_size: int = 8
    """Rows a pass, beams not counted."""


def transcribe(
    engine: Engine,
    hearing: Hearing,
    tokens: SpeechTokens,
    jobs: Sequence[Heard],
    manner: Manner,
    busy: Callable[[int, int], None],
) -> list[list[Segment]]:
    """The segments that the model hears in each job. `busy` is told of jobs done and in all, and may raise."""
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].timestamps, round(jobs[i].seconds, 1), i))
    found: list[list[Segment]] = [[] for _ in jobs]
    done = 0
    while done < len(order):
        part = order[done : done + manner.batch_size]
        part = [i for i in part if jobs[i].timestamps == jobs[part[0]].timestamps]
        ids = _generate(engine, hearing, tokens, [jobs[i] for i in part], manner)
        for i, row in zip(part, ids, strict=True):
            found[i] = tokens.segments(row)
        done += len(part)
        busy(done, len(jobs))
    return found


def _generate(engine: Engine, hearing: Hearing, tokens: SpeechTokens, jobs: Sequence[Heard], manner: Manner) -> list[list[int]]:
    """Each row's generated ids, in passes as small as memory asks for."""
    features = hearing.remembered([(job.key, job.samples) for job in jobs], engine.bank.device)
    batch = ModelBatch(
        inputs={"input_features": features},
        targets={},
        loss=_no_loss,
        routes=tuple(job.route for job in jobs),
        weights=(1.0,) * len(jobs),
        sizes=(max(1, round(hearing.window)),) * len(jobs),
        examples_E=torch.arange(len(jobs)),
    )
    found: list[list[int]] = [[] for _ in jobs]

    def compute(part: ModelBatch, rows: Sequence[int]) -> Tensor:
        languages = [tokens.code(jobs[row].language) for row in rows]
        ids = _pass(engine, tokens, part, languages, jobs[0].timestamps, manner)
        for row, mine in zip(rows, ids.tolist(), strict=True):
            found[row] = mine
        return ids[:, :1]

    engine.fits.in_parts(batch, compute, engine.release)
    return found


def _pass(
    engine: Engine, tokens: SpeechTokens, batch: ModelBatch, languages: Sequence[str], timestamps: bool, manner: Manner
) -> Tensor:
    """Generated ids (N, L) behind the prefix, padded with the end."""
    model: Any = engine.bank.model
    batch = batch.to(engine.bank.device)
    prefix = len(tokens.prefix(languages[0], manner.task, timestamps=timestamps))
    settings = _settings(model.generation_config, tokens, manner, prefix)
    says = {"language": list(languages), "task": manner.task} if tokens.multilingual else {}
    repeat = ("interleave", manner.beams) if manner.beams > 1 else None
    with (
        torch.no_grad(),
        evaluation_mode(model.modules()),
        engine.bank.route(list(batch.routes), repeat=repeat),
        quiet_transformers(),
    ):
        out = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard(model, batch.inputs["input_features"])),
            generation_config=settings,
            return_timestamps=timestamps,
            return_dict_in_generate=True,
            force_unique_generate_call=True,  # one pass over these rows: a second one would have fewer, and other routes
            **says,
        )
    return out.sequences[:, prefix:] if bool((out.sequences[:, 0] == tokens.start).all()) else out.sequences


def _settings(given: Any, tokens: SpeechTokens, manner: Manner, prefix: int) -> Any:
    """The model's own generation settings, with what `manner` asks for, and the tokens that older checkpoints don't name."""
    settings = copy.deepcopy(given)
    settings.max_length, settings.max_new_tokens = None, min(manner.max_new_tokens, tokens.longest - prefix)
    settings.num_beams, settings.do_sample, settings.forced_decoder_ids = manner.beams, False, None
    settings.no_timestamps_token_id, settings.is_multilingual = tokens.no_timestamps, tokens.multilingual
    if tokens.multilingual:
        settings.lang_to_id = {f"<|{code}|>": number for code, number in tokens.languages.items()}
        settings.task_to_id = dict(tokens.tasks)
    return settings


def _no_loss(model: torch.nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    raise NotImplementedError("recordings without transcripts have no loss")


def cuts(samples_S: np.ndarray, rate: int, window: float) -> list[tuple[float, float]]:
    """(start, end), seconds, of stretches of at most `window`: each ends at the quietest moment of its window's last third."""
    total, size = len(samples_S), round(window * rate)
    places = [0]
    while total - places[-1] > size:
        first = places[-1] + round(size * (1 - SEARCHED))
        places.append(_quietest(samples_S, first, places[-1] + size, round(QUIET_S * rate)))
    places.append(total)
    return [(a / rate, b / rate) for a, b in pairwise(places)]


def _quietest(samples_S: np.ndarray, first: int, last: int, width: int) -> int:
    """The middle of the quietest `width` samples between two places; the last such where several are alike."""
    width = max(1, min(width, last - first - 1))
    power = np.concatenate([[0.0], np.cumsum(samples_S[first:last].astype(np.float64) ** 2)])
    loud = power[width:] - power[:-width]
    at = len(loud) - 1 - int(np.argmin(loud[::-1].round(6)))
    return first + at + width // 2


def moved(segments: Sequence[Segment], seconds: float, end: float) -> list[Segment]:
    """A window's segments as those of the whole recording, none reaching beyond the window's end."""
    return [
        Segment(
            s.text,
            None if s.start is None else min(s.start + seconds, end),
            None if s.end is None else min(s.end + seconds, end),
        )
        for s in segments
    ]
