"""`run_training`: a Trainer from first event to finished folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabank import __version__
from lorabank.errors import OutputError
from lorabank.training.cards import CardFacts, write_card
from lorabank.training.checkpoint import newest_checkpoint, read_checkpoint
from lorabank.training.evaluate import BASE_NAME, Generated, generate_answers, unique_prompts
from lorabank.training.events import AdapterResult, RunResult
from lorabank.training.interrupt import StopRequested
from lorabank.training.metrics_file import cut_back
from lorabank.training.plots import loss_plot
from lorabank.training.progress import INTERRUPTED, RUNNING
from lorabank.training.run_folder import RunFolder
from lorabank.training.setup import run_plan
from lorabank.training.trainer import Trainer

HARDEST_ROWS = 20


def run_training(trainer: Trainer, *, model_name: str, resume: bool | str = False) -> RunResult:
    """Train, score, save. Interrupted, it saves a checkpoint and says how to go on."""
    folder = trainer.folder
    resumed_from = _resume(trainer, folder, resume) if resume and folder else None
    for listener in trainer.listeners:
        listener.on_start(run_plan(trainer, model_name=model_name, resumed_from=resumed_from))
    began = time.monotonic() - trainer.progress.seconds
    finished = trainer.run()
    if folder is not None and finished:
        trainer.save_checkpoint()
    scores: Mapping[str, Mapping[str, float]] = {}
    if finished:
        scores = _finish(trainer, folder, model_name)
    result = _result(trainer, scores, seconds=time.monotonic() - began, interrupted=not finished)
    for listener in trainer.listeners:
        listener.on_end(result)
    if folder is not None:
        _plot(folder)
    return result


def _resume(trainer: Trainer, folder: RunFolder, resume: bool | str) -> str:
    path = Path(resume) if isinstance(resume, str) else newest_checkpoint(folder.checkpoints)
    if isinstance(resume, str) and not path.exists():
        path = folder.checkpoints / resume
    trainer.resume(read_checkpoint(path))
    if folder.metrics.exists():
        cut_back(folder.metrics, trainer.progress.pass_index)
    return str(path)


def _finish(trainer: Trainer, folder: RunFolder | None, model_name: str) -> dict[str, dict[str, float]]:
    """Save first, then score: what takes long or can fail comes after the adapters are on the disk."""
    names = list(trainer.jobs)
    for name in names:
        if folder is not None:
            folder.save_adapter(name, _named(trainer, name, model_name), trainer.tokenizer, last=True)
        trainer.use_best(name)
        if folder is not None:
            folder.save_adapter(name, _named(trainer, name, model_name), trainer.tokenizer)
    scores: dict[str, dict[str, float]] = {}
    try:
        scores = trainer.final_scores(names)
        if folder is not None:
            _samples(trainer, folder, names)
    except StopRequested:
        trainer.notice(
            "interrupted while scoring; the adapters are trained and saved. Score them with: lorabank eval <output>",
            level="warning",
        )
    if folder is not None:
        _write_about(trainer, folder, model_name, scores)
    return scores


def _named(trainer: Trainer, name: str, model_name: str) -> Any:
    from dataclasses import replace

    return replace(trainer.bank.adapter(name), base_model=model_name)


def _samples(trainer: Trainer, folder: RunFolder, names: Sequence[str]) -> None:
    count = trainer.config.eval.samples
    prompts = unique_prompts(trainer.base_rows(), count) if count else []
    if not prompts:
        return

    def busy(activity: str, done: int, total: int) -> None:
        for listener in trainer.listeners:
            listener.on_busy("samples", done, total)

    names = [BASE_NAME, *names]
    limits = trainer.config.eval
    generate_answers(
        trainer.engine,
        trainer.tokenizer,
        prompts,
        names,
        max_new_tokens=limits.max_new_tokens,
        batch_size=limits.batch_size,
        busy=busy,
    )
    samples: list[Generated] = [generated for _, generated in prompts]
    folder.write_samples(trainer.progress.pass_index, samples)


def _write_about(trainer: Trainer, folder: RunFolder, model_name: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Model cards, and the rows with the highest loss."""
    summary = trainer.bank.summary()
    for name, job in trainer.jobs.items():
        p = trainer.progress.adapters[name]
        facts = CardFacts(
            name=name,
            base_model=model_name,
            run=job.run,
            learning_rate=job.learning_rate,
            parameters=summary.adapters[name].parameters,
            base_parameters=summary.base_parameters,
            layers=summary.adapters[name].layers,
            steps=p.step,
            best_step=p.best_step,
            train_rows=len(job.stream.rows),
            val_rows=len(job.val),
            data=Path(job.data).name,
            metrics=scores.get(name, p.best_metrics),
            base_metrics=scores.get(BASE_NAME, trainer.progress.base_metrics),
            tokens_seen=int(p.tokens_seen),
            version=__version__,
        )
        write_card(folder.path / name, facts)
    folder.write_hardest({name: hardest_rows(trainer, name) for name in trainer.jobs})


def hardest_rows(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    """The adapter's training rows with the highest loss when they were last seen: where wrong labels and odd rows gather."""
    rows = trainer.jobs[name].stream.rows
    worst = sorted(trainer.progress.adapters[name].row_losses.items(), key=lambda item: -item[1])[:HARDEST_ROWS]
    return [
        {"origin": rows[int(i)].origin, "loss": loss, "prompt": rows[int(i)].prompt_text, "answer": rows[int(i)].reference}
        for i, loss in worst
    ]


def _result(trainer: Trainer, scores: Mapping[str, Mapping[str, float]], *, seconds: float, interrupted: bool) -> RunResult:
    output = str(trainer.folder.path) if trainer.folder else ""
    adapters = {}
    for name, p in trainer.progress.adapters.items():
        status = INTERRUPTED if interrupted and p.status == RUNNING else p.status
        final = {key: value for key, value in p.last_metrics.items() if key != "step"}
        adapters[name] = AdapterResult(
            name=name,
            folder=str(Path(output) / name) if output else "",
            steps=p.step,
            status=status,
            best_step=p.best_step,
            best_metrics=scores.get(name, p.best_metrics),
            final_metrics=final,
        )
    return RunResult(
        output=output,
        seconds=seconds,
        adapters=adapters,
        base_metrics=scores.get(BASE_NAME, trainer.progress.base_metrics),
        interrupted=interrupted,
        resume_command=f"lorabank train {output} --resume" if interrupted and output else None,
    )


def _plot(folder: RunFolder) -> None:
    if not folder.metrics.exists():
        return
    try:
        loss_plot(folder.metrics, folder.path / "loss.png")
    except OSError as error:
        raise OutputError(f"{folder.path}/loss.png couldn't be written: {error}. The adapters are saved.") from error
