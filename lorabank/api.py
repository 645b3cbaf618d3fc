"""What `lorabank.train` and the command line stand on: runs from names and paths, or from objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.config.parse import load_config, to_dict
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, TrainConfig
from lorabank.errors import AdapterNameError, ConfigError, DataError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorabank.bank.bank import AdapterBank
    from lorabank.data.render import TokenRow
    from lorabank.training.events import Listener, RunResult

BASE_NAME = "base"


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    adapters: Mapping[str, AdapterRun | Mapping[str, Any]] | None = None,
    resume: bool | str = False,
    dry_run: bool = False,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> RunResult:
    """Train one or many adapters in one pass over a frozen base.

    From names and paths: `train(TrainConfig(...))` or `train("run.yaml")`. From objects: `train(model=model, tokenizer=tok,
    data=rows_or_dataset, adapters={"formal": {"rank": 16}}, output="out/x", epochs=1, …)`; further keywords are the settings of
    a configuration file. Without `output` nothing is written and the adapters stay in `model`'s bank… which is detached at the
    end, so give one. `resume`: True for the newest checkpoint, or a checkpoint's name. Raises LorabankError before the first
    step for anything that is wrong with the settings, the data or the output folder.
    """
    import torch

    from lorabank.models.load import load_base
    from lorabank.training.metrics_file import MetricsFile
    from lorabank.training.run import run_training
    from lorabank.training.run_folder import RunFolder
    from lorabank.training.setup import build_trainer, load_data
    from lorabank.training.trackers import make_trackers

    config = _resolve(config, adapters, settings, has_model=model is not None, has_data=data is not None)
    if (model is None) != (tokenizer is None):
        raise ConfigError("train: model and tokenizer go together; give both objects, or a model name in the configuration")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(config.output) if config.output and not dry_run else None
    if folder is not None and not resume:
        folder.refuse_existing()
    notes: list[str] = []
    if model is None or tokenizer is None:
        base = load_base(
            config.model,
            dtype=config.base_dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            say=_tell(listeners),
        )
        model, tokenizer, name = base.model, base.tokenizer, _public_name(base.name, base.folder)
        notes += base.notes
    else:
        name = str(getattr(model.config, "_name_or_path", "") or config.model)
    sets = load_data(config, tokenizer, rows=data, progress=_busy(listeners, "reading data"))
    everyone: list[Listener] = list(listeners)
    if folder is not None:
        if not resume:
            folder.create(config)
        folder.write_reports(sets.reports)
        everyone += [MetricsFile(folder.metrics), *make_trackers(config.report_to, folder.path, to_dict(config))]
    trainer = build_trainer(config, model, tokenizer, sets, folder=folder, listeners=everyone)
    try:
        for note in notes:
            trainer.notice(note)
        _tell_about_data(trainer, sets)
        if dry_run:
            return _dry(trainer, name)
        return run_training(trainer, model_name=name, resume=resume)
    finally:
        trainer.bank.detach()


def preview(config: TrainConfig, *, count: int = 3) -> None:
    """Print rows of every data set as the model will see them, trained tokens coloured."""
    from rich.console import Console

    from lorabank.data.preview import preview as print_rows
    from lorabank.models.load import load_tokenizer
    from lorabank.training.setup import load_data

    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    console = Console()
    shown: set[str] = set()
    sets = load_data(config, tokenizer)
    for name, prepared in sets.by_adapter.items():
        if sets.names[name] not in shown:
            shown.add(sets.names[name])
            console.rule(sets.names[name])
            print_rows(prepared.train, tokenizer, console, count)
            console.print(prepared.report)


@dataclass(frozen=True)
class LoadedRun:
    """A base model with trained adapters in a bank, ready to be talked to."""

    bank: AdapterBank
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    names: list[str]
    """Adapters in the bank."""
    config: TrainConfig | None
    """Of the run that they came from, when there is one."""


def load_run(source: str, adapters: Sequence[str] | None = None, *, device: str = "auto", dtype: str = "auto") -> LoadedRun:
    """Load a run folder, an adapter folder or a plain base model. `adapters`: which of a run's; `base` needs no loading."""
    from lorabank.bank.attach import attach
    from lorabank.formats.adapter import Adapter
    from lorabank.models.load import load_base

    path = Path(source)
    config = load_config(path)[0] if (path / "config.yaml").is_file() else None
    folders = _adapter_folders(path)
    wanted = [name for name in adapters or folders if name != BASE_NAME]
    for name in wanted:
        if name not in folders:
            raise AdapterNameError(
                f"{source}: no adapter {name!r}{closest(name, folders)}. It has: {', '.join(folders) or 'none'}."
            )
    loaded = {name: Adapter.load(folders[name]) for name in wanted}
    base_name = config.model if config else next((a.base_model for a in loaded.values() if a.base_model), None)
    if folders and not base_name:
        raise ConfigError(f"{source}: neither the run nor its adapters say which base model they belong to")
    base = load_base(base_name or source, dtype=dtype, device=device)
    bank = attach(base.model)
    for name, adapter in loaded.items():
        bank.load(name, adapter)
    return LoadedRun(bank, base.model, base.tokenizer, list(loaded), config)


def evaluate(
    source: str,
    adapters: Sequence[str] | None,
    data: DataConfig,
    *,
    metrics: Sequence[str] = ("loss",),
    max_rows: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, dict[str, float]]:
    """Score adapters and `base` on held-out rows: `data.test` if given, else the run's test or validation rows."""
    from lorabank.engine.step import Engine
    from lorabank.training.busy import BusyBar
    from lorabank.training.evaluate import full_scores
    from lorabank.training.scorers import split_metrics

    split_metrics(metrics)
    run = load_run(source, adapters, device=device, dtype=dtype)
    names = list(dict.fromkeys(adapters)) if adapters else [*run.names, BASE_NAME]
    rows = _held_out(run, names, data)
    with BusyBar() as busy:
        config = EvalConfig(
            metrics=tuple(metrics), max_rows=max_rows, max_prompts=max_rows, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        return full_scores(Engine(run.bank), run.tokenizer, rows, config=config, busy=busy)


def generate_stream(
    run: LoadedRun,
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[str | None]]:
    """Answers to (adapter or `base`, messages) rows, all in one batch, as lists of new text; None once a row has ended."""
    from lorabank.data.prompt import chat_prompt_ids
    from lorabank.engine.generate import stream
    from lorabank.engine.sampling import SamplingConfig
    from lorabank.engine.step import Engine
    from lorabank.training.evaluate import end_tokens, pad_token, route_of
    from lorabank.training.streaming import TextStream

    prompts = [chat_prompt_ids(run.tokenizer, messages) for _, messages in rows]
    texts = [TextStream(run.tokenizer) for _ in rows]
    ended = [False] * len(rows)
    deltas: list[str | None] = [""] * len(rows)
    seen: set[int] = set()
    for new in stream(
        run.bank,
        prompts,
        [route_of(name) for name, _ in rows],
        config=SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p),
        end_ids=end_tokens(Engine(run.bank), run.tokenizer),
        pad_id=pad_token(run.tokenizer),
        seeds=[seed] * len(rows),
    ):
        if new.row in seen:
            yield deltas
            deltas, seen = [None if done else "" for done in ended], set()
        seen.add(new.row)
        text = "" if new.is_end else texts[new.row].add(new.token)
        if new.last:
            text += texts[new.row].end()
            ended[new.row] = True
        deltas[new.row] = text
    yield deltas


# ---- inside ---------------------------------------------------------------------------------------------------------


def _resolve(
    config: TrainConfig | str | Path | None,
    adapters: Mapping[str, AdapterRun | Mapping[str, Any]] | None,
    settings: Mapping[str, Any],
    *,
    has_model: bool,
    has_data: bool,
) -> TrainConfig:
    from lorabank.config.parse import config_from_dict

    if config is not None and (settings or adapters):
        raise ConfigError(
            "train: give a configuration, or settings as keywords, not both. dataclasses.replace(config, …) changes one."
        )
    if isinstance(config, str | Path):
        config = load_config(config)[0]
    if config is None:
        tree: dict[str, Any] = dict(settings)
        if adapters:
            tree["adapters"] = {
                name: a if isinstance(a, Mapping) else to_dict(TrainConfig(adapters={"x": a}))["adapters"]["x"]
                for name, a in adapters.items()
            }
        config = config_from_dict(tree)[0]
    if not config.model and not has_model:
        raise ConfigError("model: missing. Give a hub id, a folder, or a model object.")
    if not has_data and config.data.train is None and not (config.adapters and all(run.data for run in config.adapters.values())):
        raise ConfigError("data: missing. Give data.train, a data file for each adapter, or the rows as an object.")
    return config


def _public_name(name: str, folder: Path) -> str:
    """What other tools can load below the adapter: an alias of ours means nothing to them."""
    return name if "/" in name or Path(name).exists() else str(folder)


def _adapter_folders(path: Path) -> dict[str, Path]:
    """Adapter name to folder, of a run folder or a single adapter's."""
    if (path / "adapter_config.json").is_file():
        return {path.resolve().name: path}
    if not path.is_dir():
        return {}
    return {p.name: p for p in sorted(path.iterdir()) if (p / "adapter_config.json").is_file()}


def _held_out(run: LoadedRun, names: Sequence[str], data: DataConfig) -> dict[str, Sequence[TokenRow]]:
    from lorabank.data.prepare import prepare
    from lorabank.training.setup import load_data

    if data.test or (data.train is None and (run.config is None or run.config.data != data)):
        source = data.test or data.val
        if source is None:
            raise DataError("evaluation: no rows. Give data.test.")
        own = prepare(replace(data, train=source, val=None, test=None, val_split=0, test_split=0), run.tokenizer, seed=0).train
        return dict.fromkeys(names, own)
    config = run.config if run.config is not None and run.config.data == data else TrainConfig(data=data)
    sets = load_data(config, run.tokenizer).by_adapter
    held = {name: prepared.test or prepared.val for name, prepared in sets.items()}
    first = next(iter(held.values()))
    return {name: held.get(name, first) for name in names}


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


def _tell_about_data(trainer: Any, sets: Any) -> None:
    for name, prepared in {sets.names[n]: p for n, p in sets.by_adapter.items()}.items():
        for line in prepared.report.lines():
            trainer.notice(f"{Path(name).name}: {line}")


def _dry(trainer: Any, model_name: str) -> RunResult:
    """Everything but the training: the plan is told, the first pass is built."""
    from lorabank.training.events import AdapterResult, RunResult
    from lorabank.training.setup import run_plan

    for listener in trainer.listeners:
        listener.on_start(run_plan(trainer, model_name=model_name, resumed_from=None))
    results = {
        name: AdapterResult(
            name=name, folder="", steps=0, status="not trained (dry run)", best_step=None, best_metrics={}, final_metrics={}
        )
        for name in trainer.jobs
    }
    return RunResult(output="", seconds=0.0, adapters=results)
