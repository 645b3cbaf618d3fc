"""What `lorabank.train` and the command line stand on: runs from names and paths, or from objects.

How a run is put together is here; what is done with one afterwards is in `trained.py`, and can be called from here too.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.config.paths import with_absolute_paths
from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.errors import ConfigError, Setting
from lorabank.trained import evaluate, generate_stream, load_run, predict

if TYPE_CHECKING:
    from torch import nn

    from lorabank.config.adapter import AdapterConfig
    from lorabank.training.data_sets import DataSets, RowObjects
    from lorabank.training.events import Listener, RunResult
    from lorabank.training.run_folder import RunFolder
    from lorabank.training.task import Task, TaskBase
    from lorabank.training.trainer import Trainer

__all__ = ["evaluate", "generate_stream", "load_run", "predict", "preview", "train"]

COMPILING = "the model's blocks are compiled: the first step takes about {} longer. compile: false leaves that out"
"""Said where nobody asked for it."""
ON_CPU = (
    "the model's blocks are compiled, as compile asks: on a CPU the first step takes minutes, as may each new shape of batch. "
    "compile: false leaves that out"
)
UNCOMPILED = "the model's blocks aren't compiled, so steps are slower: {}. compile: false silences this"


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    adapters: Mapping[str, AdapterRun | AdapterConfig | Mapping[str, Any]] | None = None,
    resume: bool | str = False,
    dry_run: bool = False,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> RunResult:
    """Train one or many adapters in one pass over a frozen base; returns their scores and, in `trained`, the adapters.

    From names and paths: `train(TrainConfig(...))` or `train("run.yaml")`. From objects: `train(model=model, tokenizer=tok,
    data=rows, adapters={"formal": {"rank": 16}}, output="out/x", epochs=1, …)`; further keywords are the settings of a
    configuration file, and hold for every adapter that doesn't say otherwise.

    `model`: an object, or a name. `tokenizer`: what prepares the inputs of a model object: a tokenizer; for other tasks than
    those of text (`task=…`) an image processor, a WhisperProcessor, a SpeechT5Processor. image-classification makes a plain
    image processor where none is given (settings `images.image_size`, `fit`, `mean`, `std`), and text-to-image takes a pipeline
    of diffusers as `model`, which has its own.

    `data`: rows (a `datasets.Dataset` or a list of dicts), a path, splits (`{"train": …, "validation": …}`, a `DatasetDict`),
    adapter names to rows, or the settings of a file's section `data`. `adapters`: names to settings, `AdapterRun`,
    `AdapterConfig` or `peft.LoraConfig`; what such a value leaves at its default follows the run's own settings. Without
    `output` nothing is written. A model given as an object is afterwards as it was before, to the bit: put an adapter onto it
    with `bank.load(name, result.trained[name])`. `resume`: True for the newest checkpoint in `output`, or a checkpoint's name.
    Raises LorabankError, before the first step and with nothing written, for anything wrong with settings, data or folder.
    """
    import torch

    from lorabank.training.objects import check_complete, data_section, resolve_config, resolve_rows

    if isinstance(model, str | Path):
        settings, model = {**settings, "model": str(model)}, None
    section = data_section(data, adapters)
    if section is not None:
        settings, data = {**settings, "data": section}, None
    config, notes = resolve_config(config, adapters, settings)
    if model is None and tokenizer is not None:
        raise ConfigError("tokenizer: given without a model. Give both objects, or a model's name alone, whose own is read.")
    rows, config = resolve_rows(data, config)
    config = with_absolute_paths(config)  # its folder may be used from another working folder
    check_complete(config, rows, has_model=model is not None)
    _check_early(config, resume=bool(resume), dry_run=dry_run)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        return _train(config, model, tokenizer, rows, notes, resume=resume, dry_run=dry_run, listeners=listeners)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    rows: RowObjects,
    notes: Sequence[str],
    *,
    resume: bool | str,
    dry_run: bool,
    listeners: Sequence[Listener],
) -> RunResult:
    from lorabank.engine.compiling import uncompile_blocks
    from lorabank.notices import new_run
    from lorabank.tasks import task_kind
    from lorabank.training.compiler_log import without_recompilations
    from lorabank.training.run import command_for, resume_run, run_training
    from lorabank.training.run_folder import RunFolder
    from lorabank.training.setup import build_trainer, check_best
    from lorabank.training.start import warnings_as

    new_run()
    for text in notes:
        _tell(listeners)(text)
    folder = RunFolder(config.output) if config.output and not dry_run else None
    from_objects = model is not None or rows.train is not None or bool(rows.by_adapter)
    base = _base(config, model, tokenizer, listeners)
    model, more, for_python = base.model, [*base.notes], model is not None and not base.name
    task = task_kind(config.task).open(config, model, base.processor, {})
    check_best(task, config)  # before rows are read, which may take long
    sets = task.read(config, rows, _busy(listeners, "reading data"))
    everyone: list[Listener] = list(listeners)
    trainer, notices = build_trainer(config, model, task, sets, folder=folder, listeners=everyone)
    compiled: list[nn.Module] = []
    try:
        with warnings_as(notices):
            compiled, why_not = _compiled(config, model, task, recompute=trainer.engine.gradient_checkpointing)
        trainer.engine.uncompiled = not compiled
        resumed_from = None
        if folder is not None:
            resumed_from = resume_run(trainer, folder, resume) if resume else None
            everyone += _open_folder(folder, config, trainer, sets, fresh=not resume)
        if config.compile is None and (compiled or why_not):
            more = [*more, COMPILING.format(task.compiling) if compiled else UNCOMPILED.format(why_not)]
        elif compiled:
            on_cpu = next(model.parameters()).device.type == "cpu"
            more = [*more, ON_CPU if on_cpu else COMPILING.format(task.compiling)]
        for text in more:
            trainer.notice(text)
        for notice in notices:
            trainer.notice(notice.text, notice.adapter, notice.level)
        _tell_about_data(trainer, sets)
        if resume and folder is not None and resumed_from is None:
            # not for the metrics: they are those of a run that wasn't ended
            _tell(listeners)("the run was ended before its first checkpoint: it starts from the beginning")
        if dry_run:
            with without_recompilations(bool(compiled)):
                return _dry(trainer, base.name)
        command = command_for(config, from_objects=from_objects)
        how: Any = {"resumed_from": resumed_from, "resume_command": command, "for_python": for_python}
        with without_recompilations(bool(compiled)):
            return run_training(trainer, model_name=base.name, **how)
    finally:
        trainer.bank.detach()
        uncompile_blocks(compiled)


def _compiled(config: TrainConfig, model: Any, task: Task[Any], *, recompute: bool) -> tuple[list[nn.Module], str | None]:
    """(the blocks that are compiled for this run and weren't before, why there are none where nobody says)."""
    from lorabank.engine.compiling import uncompiled_because

    why_not = uncompiled_because(model) if config.compile is None else None
    wanted = why_not is None if config.compile is None else config.compile
    return task.compile_model(recompute=recompute) if wanted else [], why_not


def preview(config: TrainConfig, *, count: int = 3, pictures: str | Path = "lorabank-preview") -> None:
    """Print rows of every data set as training sees them; what is no text is drawn into the folder `pictures`."""
    from lorabank.tasks.preview import preview as show

    show(config, count=count, pictures=pictures)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _check_early(config: TrainConfig, *, resume: bool, dry_run: bool) -> None:
    """What can be known to be wrong before the model is loaded."""
    from lorabank.tasks import task_kind
    from lorabank.training.run_folder import RunFolder
    from lorabank.training.trackers import check_trackers

    kind = task_kind(config.task)
    try:
        kind.check_metrics(config.eval.metrics)
    except ConfigError as error:
        raise ConfigError(f"eval.metrics: {error}") from error
    if config.base_dtype in ("fp8", "nf4") and not kind.quantises:
        raise ConfigError(f"base_dtype: {config.base_dtype} is for text-generation alone so far. Use bf16 or fp32.")
    if config.activation_offloading and not kind.offloads:
        raise ConfigError(
            Setting("activation_offloading"),
            ": is for text-generation alone so far. Use gradient_checkpointing, or smaller batches with gradient_accumulation.",
        )
    if config.report_to and not config.output:
        raise ConfigError(
            f"report_to: {', '.join(config.report_to)} needs output, the run's folder. Set output, or leave it out."
        )
    check_trackers(config.report_to)
    if resume and not config.output:
        raise ConfigError("resume: needs the run's folder as output")
    if not config.output or dry_run:
        return
    folder = RunFolder(config.output)
    if resume:
        folder.check_resumable()
    else:
        folder.refuse_existing()


def _base(config: TrainConfig, model: Any, tokenizer: Any, listeners: Sequence[Listener]) -> TaskBase:
    """The base of the run, from objects or by its name; called by a name that other tools can load ('' without one)."""
    from lorabank.tasks import task_kind
    from lorabank.training.given import given_base, public_name
    from lorabank.training.task import BaseRequest

    kind = task_kind(config.task)
    if model is not None:
        how: Any = {"dtype": config.base_dtype, "device": config.device}
        return given_base(kind, model, tokenizer, task=config.task, name=config.model, **how)
    request = BaseRequest(
        model=config.model, dtype=config.base_dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    base = kind.load(request, _tell(listeners))
    return replace(base, name=public_name(base.name, base.folder))


def _open_folder(folder: RunFolder, config: TrainConfig, trainer: Trainer, sets: DataSets[Any], *, fresh: bool) -> list[Listener]:
    """Make the run's folder and everything that writes into it; on an error a fresh folder is as it was, empty or absent."""
    from lorabank.config.parse import to_dict
    from lorabank.training.metrics_file import MetricsFile
    from lorabank.training.trackers import make_trackers

    existed = folder.path.is_dir()
    try:
        if fresh:
            folder.create(config)
        folder.write_reports(sets.reports)
        trackers = make_trackers(config.report_to, folder.path, to_dict(config))
    except BaseException:
        if fresh:
            shutil.rmtree(folder.path, ignore_errors=True)
            if existed:
                with contextlib.suppress(OSError):
                    folder.path.mkdir()
        raise
    return [MetricsFile(folder.metrics, lambda text: trainer.notice(text, level="warning")), *trackers]


def _tell(listeners: Sequence[Listener]) -> Any:
    from lorabank.training.events import Notice

    def say(line: str) -> None:
        for listener in listeners:
            listener.on_notice(Notice(text=line))

    return say


def _busy(listeners: Sequence[Listener], activity: str) -> Any:
    def busy(done: int, total: int) -> None:
        for listener in listeners:
            listener.on_busy(activity, done, total)

    return busy


def _tell_about_data(trainer: Trainer, sets: DataSets[Any]) -> None:
    for name, prepared in {sets.names[n]: p for n, p in sets.by_adapter.items()}.items():
        for line in prepared.report.lines():
            trainer.notice(f"{Path(name).name}: {line}")


def _dry(trainer: Trainer, model_name: str) -> RunResult:
    """Everything but the training: the plan is told, and a row of each adapter goes through the model."""
    from lorabank.training.events import AdapterResult, RunResult
    from lorabank.training.setup import run_plan

    for listener in trainer.listeners:
        listener.on_start(run_plan(trainer, model_name=model_name, resumed_from=None))
    trainer.rehearse()
    results = {
        name: AdapterResult(
            name=name, folder="", steps=0, status="not trained (dry run)", best_step=None, best_metrics={}, final_metrics={}
        )
        for name in trainer.jobs
    }
    return RunResult(output="", seconds=0.0, adapters=results)
