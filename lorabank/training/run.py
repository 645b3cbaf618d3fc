"""`run_training`: a Trainer from first event to finished folder; `resume_run` puts it back to where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorabank import __version__
from lorabank.config.adapter import AdapterConfig
from lorabank.config.parse import to_dict
from lorabank.config.paths import with_absolute_paths
from lorabank.config.tasks import DEFAULT_TASK
from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.errors import CheckpointError, OutputError
from lorabank.formats.adapter import Adapter
from lorabank.training.base_rows import BASE_NAME, base_labels, base_rows, is_base
from lorabank.training.cards import CardFacts, write_card
from lorabank.training.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint, remove_newer
from lorabank.training.events import AdapterResult, RunResult
from lorabank.training.interrupt import InterruptFlag, StopRequested, interruptible
from lorabank.training.metrics_file import cut_back
from lorabank.training.next_steps import Titled
from lorabank.training.plots import loss_plot
from lorabank.training.progress import INTERRUPTED, NOT_FINITE, RUNNING, AdapterProgress
from lorabank.training.run_folder import RunFolder, resume_line
from lorabank.training.serving import folder_obstacle
from lorabank.training.setup import run_plan
from lorabank.training.task import TASK_KEY
from lorabank.training.trainer import Trainer

HARDEST_ROWS = 20
FREE_SETTINGS = (
    "output",
    "save",
    "report_to",
    "device",
    "threads",
    "compile",
    "metrics",
    "samples",
    "max_prompts",
    "max_new_tokens",
)
"""What a resumed run may have otherwise."""


def resume_run(trainer: Trainer, folder: RunFolder, resume: bool | str) -> str | None:
    """Put the newest checkpoint's state (or that of the one called `resume`) back and cut the metrics to it.

    Returns its path; None where a run was ended before its first checkpoint, which starts again then. Raises CheckpointError,
    with nothing changed, when there is no run to resume or it had other settings or data.
    """
    before = folder.check_resumable()
    path = find_checkpoint(folder.checkpoints, resume) if isinstance(resume, str) else newest_checkpoint(folder.checkpoints)
    if path is None:
        check_same(before, trainer.config)
        folder.metrics.unlink(missing_ok=True)
        folder.tidy()
        return None
    checkpoint = read_checkpoint(path)
    trainer.resume(checkpoint)
    folder.tidy()
    if isinstance(resume, str):
        remove_newer(path)
    cut_back(folder.metrics, checkpoint.values["metrics_lines"])
    return str(path)


def check_same(before: TrainConfig, now: TrainConfig) -> None:
    """Raise CheckpointError, naming both values, where two runs differ in a setting that isn't free to."""
    old, new = (_flat(to_dict(with_absolute_paths(config))) for config in (before, now))
    for key in sorted(old.keys() | new.keys()):
        own = key[2:] if key[0] == "adapters" else key  # an adapter may be called `save`
        if old.get(key) != new.get(key) and not set(own) & set(FREE_SETTINGS):
            raise CheckpointError(
                f"{now.output}: the run there has other settings: {'.'.join(key)}: was {old.get(key)!r}, is {new.get(key)!r}. "
                "Nothing was changed. Resume with the same settings, or start afresh in another output folder."
            )


def _flat(tree: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, (*place, key)) if isinstance(value, Mapping) else {(*place, key): value}
    return flat


def run_training(
    trainer: Trainer,
    *,
    model_name: str,
    resumed_from: str | None = None,
    resume_command: str = "",
    for_python: bool = False,
) -> RunResult:
    """Train, save, score. Interrupted, it saves a checkpoint and says how to go on (`resume_command`).

    `for_python`: the base is an object that no name stands for, so what follows is told as lines for Python.
    """
    folder = trainer.folder
    for listener in trainer.listeners:
        listener.on_start(run_plan(trainer, model_name=model_name, resumed_from=resumed_from))
    began = time.monotonic() - trainer.progress.seconds
    scores: Mapping[str, Mapping[str, float]] = {}
    with interruptible() as flag:
        finished = trainer.run(flag)
        if finished:
            try:
                scores = _finish(trainer, model_name, flag)
            except StopRequested:
                finished = False
            except OutputError as error:
                raise OutputError(f"{error} The training itself is in its last checkpoint: {resume_command} saves it.") from error
        result = _result(
            trainer,
            scores,
            model_name,
            seconds=time.monotonic() - began,
            interrupted=not finished,
            resume_command=resume_command if not finished and folder is not None else None,
            for_python=for_python,
        )
        for listener in trainer.listeners:
            listener.on_end(result)
        if folder is not None:
            _plot(trainer, folder)
    return result


def _finish(trainer: Trainer, model_name: str, flag: InterruptFlag) -> dict[str, dict[str, float]]:
    """Save first, then score: what takes long or can fail comes after the adapters are on the disk."""
    folder = trainer.folder
    for name in trainer.jobs:
        if folder is not None:
            folder.save_adapter(f"{name}/last", named_adapter(trainer, name, model_name), None)
        trainer.validation.use_best(name)
        if folder is not None:
            folder.save_adapter(name, named_adapter(trainer, name, model_name), trainer.task.processor)
            trainer.task.save_more(named_adapter(trainer, name, model_name), folder.path / name, name)
    scores: dict[str, dict[str, float]] = {}
    try:
        scores = final_scores(trainer, flag)
        if folder is not None:
            _samples(trainer, folder, flag)
    except (StopRequested, OutputError):
        raise
    except Exception as error:  # noqa: BLE001  (a user's own metric may raise anything; the adapters are saved)
        trainer.notice(
            f"the final scores couldn't be computed ({type(error).__name__}: {error}). The adapters are saved; "
            "`lorabank eval` scores them.",
            level="warning",
        )
    if folder is not None:
        _write_about(trainer, folder, model_name, scores)
    return scores


def final_scores(trainer: Trainer, flag: InterruptFlag) -> dict[str, dict[str, float]]:
    """Every metric of the run's configuration, for the base and the adapters as they stand in the bank now."""
    held = {name: job.val for name, job in trainer.jobs.items() if job.val}
    labels, sets = base_labels(held), base_rows(held)
    own = {name: sets[labels[name]] for name in held}
    rows = {**sets, **own} if trainer.task.scores_base else own
    if not rows:
        return {}
    return trainer.task.scores(trainer.engine, rows, config=trainer.config.eval, busy=trainer.busy(flag))


def named_adapter(trainer: Trainer, name: str, model_name: str) -> Adapter:
    """The adapter as it stands in the bank, with a name of its base that other tools can load."""
    adapter = trainer.bank.adapter(name)
    about = {TASK_KEY: trainer.task.name, **trainer.task.about(name)} if trainer.task.name != DEFAULT_TASK else {}
    return replace(adapter, base_model=model_name or adapter.base_model, metadata={**adapter.metadata, **about})


def _samples(trainer: Trainer, folder: RunFolder, flag: InterruptFlag) -> None:
    rows = {name: trainer.validation.val_rows(name) for name in trainer.jobs}
    trainer.task.samples(trainer.engine, rows, folder.path, config=trainer.config.eval, busy=trainer.busy(flag, "samples"))


def _write_about(trainer: Trainer, folder: RunFolder, model_name: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Model cards, and the rows with the highest loss."""
    summary, base = trainer.bank.summary(), _base_metrics_of(trainer, scores)
    trained = {name: trainer.bank.adapter(name) for name in trainer.jobs}
    for name, job in trainer.jobs.items():
        p = trainer.progress.adapters[name]
        facts = CardFacts(
            name=name,
            base_model=model_name,
            run=_as_it_is(job.run, trainer.bank.config(name)),
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
            base_metrics=base.get(name, {}),
            warning=_not_finite(p),
            tokens_seen=int(p.tokens_seen),
            version=__version__,
            unserved=folder_obstacle(folder.path / name),
            pipeline_tag=trainer.task.pipeline_tag or trainer.task.name,
            task_type=trained[name].task_type,
            unit=trainer.task.unit,
            num_labels=trainer.task.labels(name),
            head=trainer.task.head,
            files=tuple(path.name for path in (folder.path / name).iterdir()),
        )
        write_card(folder.path / name, facts)
    folder.write_hardest({name: hardest_rows(trainer, name) for name in trainer.jobs})


def _base_scores(trainer: Trainer, scores: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """The base's names to its scores: the final ones, else those before the first step."""
    return {name: row for name, row in scores.items() if is_base(name)} or trainer.progress.base_metrics


def _base_metrics_of(trainer: Trainer, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Adapter to the base's scores on that adapter's held-out rows."""
    found = _base_scores(trainer, scores)
    labels = base_labels({name: job.val for name, job in trainer.jobs.items()})
    return {name: found[label] for name, label in labels.items() if label in found}


def _not_finite(p: AdapterProgress) -> str:
    """What the card of an adapter says whose loss, gradient or weights became NaN or infinite; '' of any other."""
    if p.status != NOT_FINITE:
        return ""
    kept = "of its start: they are untrained" if p.best_step is None else f"of step {p.best_step}, its best"
    return f"Training stopped after step {p.step}, since numbers became NaN or infinite. The weights here are those {kept}."


def _as_it_is(run: AdapterRun, config: AdapterConfig) -> AdapterRun:
    """The run with what the adapter really is: `init_from` brings its own ranks."""
    return replace(run, **{item.name: getattr(config, item.name) for item in fields(config)})


def hardest_rows(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    """The adapter's training rows with the highest loss when they were last seen: where wrong labels and odd rows gather."""
    rows = trainer.jobs[name].stream.rows
    worst = sorted(trainer.progress.adapters[name].row_losses.items(), key=lambda item: (-item[1], int(item[0])))[:HARDEST_ROWS]
    return [
        {"origin": rows[int(i)].origin, "loss": loss, "prompt": rows[int(i)].prompt_text, "answer": rows[int(i)].reference}
        for i, loss in worst
    ]


def _result(
    trainer: Trainer,
    scores: Mapping[str, Mapping[str, float]],
    model_name: str,
    *,
    seconds: float,
    interrupted: bool,
    resume_command: str | None,
    for_python: bool,
) -> RunResult:
    output = str(trainer.folder.path) if trainer.folder else ""
    found = _base_scores(trainer, scores)
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
        base_metrics=found.get(BASE_NAME, {}),
        base_metrics_of=_base_metrics_of(trainer, scores),
        interrupted=interrupted,
        resume_command=resume_command,
        next_lines=_next_lines(trainer, output, for_python=for_python),
        trained={name: named_adapter(trainer, name, model_name) for name in trainer.jobs},
    )


def _next_lines(trainer: Trainer, output: str, *, for_python: bool) -> Sequence[Titled]:
    names = [name for name, p in trainer.progress.adapters.items() if p.status != NOT_FINITE]
    steps = trainer.task.next_steps(names) if output and names else None
    if steps is None:
        return ()
    return [steps.for_python(output) if for_python else steps.for_shell(output)]


def _plot(trainer: Trainer, folder: RunFolder) -> None:
    if not any(p.step for p in trainer.progress.adapters.values()):
        return  # stopped before the first step: nothing to draw
    try:
        loss_plot(folder.metrics, folder.path / "loss.png", unit=trainer.task.loss_unit)
    except OSError as error:
        raise OutputError(f"{folder.path}/loss.png couldn't be written: {error}. The adapters are saved.") from error


def command_for(config: TrainConfig, *, from_objects: bool) -> str:
    """What goes on with this run: a line for the shell, or a call where rows or model were objects."""
    if from_objects:
        return f"lorabank.train(…, output={config.output!r}, resume=True)"
    return resume_line(Path(config.output))
