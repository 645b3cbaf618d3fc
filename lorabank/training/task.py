"""`Task`: one kind of work over the bank and the trainer. What it gives: model, rows, batches, loss, scores, predictions.

Joint training, checkpoints, resuming, early stopping, merging and combining are the same for all. `lorabank/tasks/` has one room
a task, and the table of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from torch import nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.engine.batch import Batch
from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import ModelBatch
from lorabank.errors import ConfigError
from lorabank.formats.adapter import Adapter
from lorabank.planner.learning_rate import LearningRateAdvice
from lorabank.training.data_sets import DataSets, Row, RowObjects
from lorabank.training.next_steps import NextSteps
from lorabank.training.processors import TOKENIZER, ProcessorKind

if TYPE_CHECKING:
    from lorabank.training.jobs import AdapterJob

Busy = Callable[[str, int, int], None]
"""(activity, done, total): progress, and the place where an impatient caller may raise."""
Say = Callable[[str], None]
Draws = Callable[[], Sequence[Sequence[int]]]
"""What each row of a preview draws in the first passes over the data, as `Task.batch` gets it; asked for where it is used."""
TASK_KEY = "task"
"""Key of an adapter's metadata that says which task it was trained for."""


@dataclass(frozen=True, kw_only=True)
class BaseRequest:
    """Which base model is wanted, from names."""

    model: str
    """Hub id, folder, or what else the task knows."""
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskBase:
    """A base model for a task, with what prepares its inputs."""

    model: nn.Module
    """In eval mode, on its device."""
    processor: Any
    """A tokenizer, image processor, …; has `save_pretrained(folder)`."""
    name: str
    """As it was asked for."""
    folder: Path | None
    """Where the weights were read; None: not from a folder."""
    notes: Sequence[str] = ()
    """Sentences for the user."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `predict` was asked for."""

    data: Source
    """Rows, files or a folder, as the task takes them; '' for none."""
    output: Path
    """File (or folder) to write; isn't there yet."""
    names: Sequence[str]
    """Adapters, and `base`."""
    max_rows: int | None = None
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the command line was told, by name; a task refuses what it doesn't know."""

    @property
    def data_name(self) -> str:
        """What messages call the data."""
        return str(self.data) if isinstance(self.data, str | Path) else f"the {type(self.data).__name__} given"


class Task(ABC, Generic[Row]):
    """A task, opened for one loaded model. Subclasses override what differs; `tasks/text_classification` is a short one."""

    name: ClassVar[str]
    """As `transformers.pipeline` has it, such as `image-classification`."""
    unit: ClassVar[str] = "rows"
    """What `TaskRow.size` counts, in the plural, for the column of speed: tokens, images, seconds of audio."""
    section: ClassVar[str | None] = None
    """Section of the configuration whose settings change results."""
    compiling: ClassVar[str] = "half a minute"
    """How much longer the first step takes where blocks are compiled, for people."""
    learning_rate: ClassVar[LearningRateAdvice | None] = None
    """What `learning_rate: auto` is; None: by the published fits, which are for language models."""
    pipeline_tag: ClassVar[str | None] = None
    """What the model card says; None: the task's name."""

    def __init__(self, config: TrainConfig, model: nn.Module, processor: Any) -> None:
        self.config, self.model, self.processor = config, model, processor

    # ---- rows -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[Row]:
        """Read, check and split every data set of the run (`read_sets` helps). Rows that can't be used are counted in the
        report by reason. Raises DataError and ConfigError, before anything is trained.

        Scoring calls it, too, with the rows to score as the training rows of a `config` without adapters."""

    @abstractmethod
    def batch(
        self, rows: Sequence[Sequence[Row]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> Batch | ModelBatch:
        """Rows as the model takes them; what an entry of `rows` holds beyond one is packed into a row.

        `examples`: each row's identity within its optimizer step. `draws`: one a row, a seed (0 ≤ seed < 2⁶³) that depends on the
        adapter's seed, the micro-batch and the row alone: whatever is random (augmentation, noise) is drawn from it, so that
        adapters trained jointly are those trained alone. Without training, all are 0: nothing random is done then.
        """

    def read_preview(self, config: TrainConfig, progress: Progress | None = None) -> DataSets[Row]:
        """`read`, without what only training needs of the rows."""
        return self.read(config, progress=progress)

    def previewed(self, rows: Sequence[Row], count: int) -> Sequence[int]:
        """Which `count` rows a preview shows, each once."""
        return range(min(count, len(rows)))

    @abstractmethod
    def preview(self, name: str, rows: Sequence[Row], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        """Print rows of an adapter as training sees them; returns pictures of them, file's name to PNG."""

    def check(self, name: str, job: AdapterJob) -> None:
        """Raise ConfigError or DataError for what could only fail after the training, or in silence."""

    def missing_labels(self, name: str, rows: Sequence[Row]) -> Sequence[str]:
        """Labels of an adapter that none of its held-out rows has; nothing where rows have no labels."""
        return ()

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def modules(self) -> Iterable[nn.Module]:
        """All that a pass runs, in the model or beside it."""
        return self.model.modules()

    @property
    def head(self) -> str | None:
        """Module that gives a number a label, where the model's class doesn't say; see `attach`."""
        return None

    def labels(self, adapter: str) -> int | None:
        """`num_labels` of its head, made anew; None: the head stays as `modules_to_save` has it. Called after `read`."""
        return None

    def about(self, adapter: str) -> Mapping[str, str]:
        """Metadata that is saved with an adapter (`lorabank.json`), such as the names of its labels."""
        return {}

    def engine(self, bank: AdapterBank) -> Engine:
        """The engine of a run."""
        config = self.config
        return Engine(
            bank, gradient_checkpointing=config.gradient_checkpointing, activation_offloading=config.activation_offloading
        )

    def compile_model(self, *, recompute: bool) -> list[nn.Module]:
        """Compile the model's blocks in place, as `compile` asks for; returns what was compiled."""
        from lorabank.engine.compiling import compile_blocks

        return compile_blocks(self.model, recompute=recompute)

    def save_more(self, adapter: Adapter, folder: Path, name: str) -> None:
        """Write a finished adapter in other forms, into its folder beside PEFT's."""

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        """What a loss is in, for people."""
        return "nats a token"

    @property
    def scores_base(self) -> bool:
        """Whether the base by itself can be scored: not where its head is random, or has other labels."""
        return True

    @abstractmethod
    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        """Names that `validate` gives besides `loss`; `eval.best` may be one of them."""

    @abstractmethod
    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[Row]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        """Scores of each name (an adapter, `base`, or `base (NAME's rows)`) on its rows, during training: `loss` and what is
        cheap enough. All names in common passes. `busy` shows progress and may raise."""

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[Row]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        """The same at the end, and for `lorabank eval`: every metric of `config.metrics`."""
        return self.validate(engine, rows, config=config, busy=busy)

    def samples(
        self,
        engine: Engine,
        rows: Mapping[str, Sequence[Row]],
        folder: Path,
        *,
        config: EvalConfig,
        busy: Busy,
    ) -> None:
        """Files for people in the run's folder, at its end: `samples.md`, pictures. `rows`: adapter to its held-out rows."""

    def show(
        self,
        engine: Engine,
        rows: Mapping[str, Sequence[Row]],
        folder: Path,
        *,
        pass_index: int,
        config: EvalConfig,
        busy: Busy,
    ) -> None:
        """Files for people every `eval.every` passes, before the first of them too. `rows`: adapter to its held-out rows."""

    # ---- afterwards -------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        """Write predictions for rows without answers; returns the sentence that the command line ends with."""

    def next_steps(self, names: Sequence[str]) -> NextSteps | None:
        """What a finished run with these adapters offers."""
        return None


def as_module(model: object) -> nn.Module:
    """What any task but drawing takes as a model. Raises ConfigError for anything else."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, or a model's name, got {type(model).__name__}.")
    return model


def any_output(output: Path) -> None:
    """For tasks that write under any name."""


Opened = Callable[[TrainConfig, Any, Any, Mapping[str, Adapter]], Task[Any]]
"""(configuration, model, processor, loaded adapters by name, whose metadata may be needed) → the task."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """An entry of the table of tasks."""

    load: Callable[[BaseRequest, Say], TaskBase]
    open: Opened
    check_metrics: Callable[[Sequence[str]], None]
    """Raises ConfigError for `eval.metrics` that the task doesn't know; called before anything is loaded."""
    processor: ProcessorKind = TOKENIZER
    """What prepares its inputs, where that is given as an object."""
    adopt: Callable[[object], nn.Module] = as_module
    """A model that was given as an object → the module that the bank goes over. Raises ConfigError for what is none."""
    check_output: Callable[[Path], None] = any_output
    """Raises ConfigError or OutputError for the name of an output that `predict` can't write, before anything is loaded."""
    quantises: bool = False
    """Whether its base may be in fp8 or nf4."""
    offloads: bool = False
    """Whether its passes have `activation_offloading`."""
    load_preview: Callable[[BaseRequest, Say], TaskBase] | None = None
    """What `lorabank preview` loads instead, where rows are shown without a model."""
