"""`TrainConfig`: a whole run as frozen values, the shape of a run's YAML file. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from lorabank.config.adapter import AdapterConfig
from lorabank.config.checks import (
    check_choice,
    check_fraction,
    check_non_negative,
    check_non_negative_int,
    check_positive,
    check_positive_int,
    check_share_or_count,
    freeze_sequences,
)
from lorabank.config.classification import ClassificationConfig
from lorabank.config.detection import DetectionConfig
from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.extras import TokenIndices
from lorabank.config.images import ImagesConfig
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.tasks import DEFAULT_TASK, SECTION_OF, TASK_SECTIONS, TASKS
from lorabank.errors import ConfigError, Setting

BASE_DTYPES = ("auto", "fp32", "bf16", "fp16", "fp8", "nf4")
LATER_BASE_DTYPES = ("int8",)
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "sgd", "lion")
TRAIN_ON = ("assistant", "completion", "all")
BAD_ROWS = ("stop", "drop")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens."""

    train: str | None = None
    """File (.jsonl .json .csv .parquet), folder of them, or a `datasets` id (`name` or `name:config:split`)."""
    val: str | None = None
    """Validation rows; same forms as `train`. Without it `val_split` of the training rows is held out."""
    test: str | None = None
    """Test rows, never seen in training or for choosing the best step."""
    val_split: float | int = 0.05
    """Share of the training rows (below 1), or their number (1 and above), held out for validation; 0 for none."""
    test_split: float | int = 0
    """Same, for a test split."""
    group_by: str | None = None
    """Column whose equal values never land in two splits."""
    max_length: int = 1024
    """Tokens; longer rows are cut at the end, and counted."""
    packing: bool = False
    """Put several training rows into one of up to `max_length` tokens, each of which sees only itself. `batch_size` then counts
    packed rows."""
    train_on: str | None = None
    """`assistant` turns, the `completion`, or `all` tokens. None: what the row's form says."""
    prompt: str | None = None
    """Template for the prompt with columns in braces, such as `"Describe: {mr}"`."""
    completion: str | None = None
    """Template for the completion, such as `"{ref}"`."""
    system: str | None = None
    """System turn put before every conversation that has none."""
    chat: bool | None = None
    """Render prompt/completion rows through the chat template. None: when the tokenizer has one."""
    limit: int | None = None
    """Use only the first rows of each file."""
    nan_rows: str = "stop"
    """What follows where a column that is used holds NaN: `stop` with an error that names the rows, or `drop` and count them."""
    bad_rows: str = "drop"
    """The same for rows that can't be used otherwise: without a label or an answer, with a file that is missing or damaged, …"""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_positive_int("data.max_length", self.max_length)
        for name in ("val_split", "test_split"):
            check_share_or_count(f"data.{name}", getattr(self, name))
        if self.train_on is not None:
            check_choice("data.train_on", self.train_on, TRAIN_ON)
        check_choice("data.nan_rows", self.nan_rows, BAD_ROWS)
        check_choice("data.bad_rows", self.bad_rows, BAD_ROWS)
        if self.limit is not None:
            check_positive_int("data.limit", self.limit)
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                Setting("data.prompt"),
                " and ",
                Setting("data.completion"),
                " go together: give both templates, such as prompt='{mr}' completion='{ref}'",
            )


@dataclass(frozen=True, kw_only=True)
class AdapterRun:
    """One adapter of a run: its configuration and how it is trained. `defaults` and every entry of `adapters` have this form."""

    rank: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    init: str = "uniform"
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    trainable_token_indices: TokenIndices = ()
    data: str | None = None
    """Training rows of this adapter alone; None: the run's `data.train`."""
    val_data: str | None = None
    """Validation rows of this adapter alone; None: split off its own training rows, or the run's `data.val`."""
    learning_rate: float | str = "auto"
    """Step size of A (and of B, unless `loraplus_ratio`); `auto` computes one and prints its reason."""
    loraplus_ratio: float = 1.0
    """Step size of B over that of A (LoRA+, arXiv:2402.12354); 1 is plain LoRA."""
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    warmup_steps: int | None = None
    """Steps of warm-up; overrides `warmup_ratio`."""
    batch_size: int = 8
    """Rows a micro-batch; with `data.packing` packed ones."""
    gradient_accumulation: int = 1
    """Micro-batches an optimizer step."""
    epochs: float = 2.0
    """Passes over the training rows; `max_steps` overrides it."""
    max_steps: int | None = None
    """Optimizer steps."""
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Largest L2 norm of this adapter's gradient; 0 switches clipping off."""
    early_stopping: int | None = None
    """Evaluations without a better validation loss after which this adapter stops."""
    init_from: str | None = None
    """Adapter folder whose weights this one starts from."""
    seed: int | None = None
    """Seed of initialisation, data order and dropout; None: the run's."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        self.adapter_config()
        if self.learning_rate != "auto":
            if isinstance(self.learning_rate, str):
                raise ConfigError(Setting("learning_rate"), f": expected a number or 'auto', got {self.learning_rate!r}")
            check_positive("learning_rate", self.learning_rate)
        check_positive("loraplus_ratio", self.loraplus_ratio)
        check_choice("lr_scheduler", self.lr_scheduler, SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_fraction("warmup_ratio", self.warmup_ratio)
        if self.warmup_steps is not None:
            check_non_negative_int("warmup_steps", self.warmup_steps)
        for name in ("batch_size", "gradient_accumulation"):
            check_positive_int(name, getattr(self, name))
        for name in ("max_steps", "early_stopping"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_positive("epochs", self.epochs)
        check_non_negative("weight_decay", self.weight_decay)
        check_positive("eps", self.eps)
        if self.seed is not None:
            check_non_negative_int("seed", self.seed)
        check_non_negative("max_grad_norm", self.max_grad_norm)
        if len(self.betas) != 2:
            raise ConfigError(Setting("betas"), f": expected two numbers, got {list(self.betas)!r}")
        for beta in self.betas:
            check_fraction("betas", beta)

    def adapter_config(self) -> AdapterConfig:
        """The part of this value that says what the adapter is."""
        return AdapterConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            exclude=self.exclude,
            layers=self.layers,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            dropout=self.dropout,
            init=self.init,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            ensure_weight_tying=self.ensure_weight_tying,
            modules_to_save=self.modules_to_save,
            bias=self.bias,
            lora_bias=self.lora_bias,
            trainable_token_indices=self.trainable_token_indices,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how the held-out rows are scored."""

    every: int = 100
    """Passes between evaluations; 0: only at the end."""
    metrics: Sequence[str] = ("loss",)
    """`loss perplexity exact_match bleu chrf rouge`, or `module:function`."""
    samples: int = 4
    """Held-out prompts whose generated answers go into samples.md."""
    best: str = "loss"
    """Metric of validation that says which step is the best, and when to stop early."""
    early_stopping: int | None = None
    """Default of every adapter's `early_stopping`."""
    max_rows: int | None = None
    """Validation loss on at most this many held-out rows an adapter, spread evenly over them."""
    max_prompts: int | None = None
    """Generated answers to at most this many different held-out prompts, spread evenly."""
    max_new_tokens: int = 128
    """Longest generated answer."""
    batch_size: int = 8
    """Rows a forward pass."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_non_negative_int("eval.every", self.every)
        check_non_negative_int("eval.samples", self.samples)
        check_positive_int("eval.max_new_tokens", self.max_new_tokens)
        check_positive_int("eval.batch_size", self.batch_size)
        for name in ("early_stopping", "max_rows", "max_prompts"):
            if getattr(self, name) is not None:
                check_positive_int(f"eval.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When checkpoints are written."""

    every: int = 200
    """Passes between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_non_negative_int("save.every", self.every)
        check_positive_int("save.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: one base model, one or more adapters trained in one pass over it."""

    model: str = ""
    """Hub id, local folder, or GGUF file of the base model."""
    base_dtype: str = "auto"
    """Storage of the frozen base: `fp32`, `bf16`, `fp16` (with a loss scale for each adapter) or `auto` (bf16 on a GPU, fp16 on
    one that lacks it, fp32 on a CPU); `fp8` (for speed) and `nf4` (for memory) quantise its linear layers."""
    output: str = ""
    """Run folder; must not exist, unless the run is resumed."""
    task: str = DEFAULT_TASK
    """What the adapters learn: `text-generation`, `text-classification`, `image-classification` … (`config/tasks.py`)."""
    data: DataConfig = field(default_factory=DataConfig)
    defaults: AdapterRun = field(default_factory=AdapterRun)
    """What every adapter has unless its own entry says otherwise."""
    adapters: Mapping[str, AdapterRun] = field(default_factory=dict)
    """Name to adapter, defaults already applied. Empty: one adapter called `default`."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    seq2seq: Seq2SeqConfig = field(default_factory=Seq2SeqConfig)
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    report_to: Sequence[str] = ()
    """`tensorboard`, `wandb`, `trackio`, `mlflow`."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep what `gradient_checkpointing` keeps in the host's memory: less GPU memory, a little slower. Switches it on."""
    compile: bool | None = None
    """Compile the model's repeated blocks: a slower start, then faster steps. None: on an NVIDIA GPU from Ampere on. On a CPU it
    needs a C++ compiler."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    seed: int = 42
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        if self.base_dtype in LATER_BASE_DTYPES:
            raise ConfigError(Setting("base_dtype"), f": {self.base_dtype} is not supported yet. Use fp8, nf4, bf16 or fp32.")
        check_choice("base_dtype", self.base_dtype, BASE_DTYPES)
        check_choice("task", self.task, TASKS)
        if self.data.packing and self.task != DEFAULT_TASK:
            raise ConfigError(
                Setting("data.packing"), f": is for {DEFAULT_TASK}, and this run's task is {self.task}. Leave it out."
            )
        self._check_sections()
        for tracker in self.report_to:
            check_choice("report_to", tracker, TRACKERS)
        check_non_negative_int("seed", self.seed)
        if self.threads is not None:
            check_positive_int("threads", self.threads)

    def _check_sections(self) -> None:
        """Raise ConfigError for a setting of another task, which would be ignored."""
        for section in TASK_SECTIONS:
            given = getattr(self, section)
            if section == SECTION_OF.get(self.task):
                continue
            for item in fields(given):
                if getattr(given, item.name) != getattr(type(given)(), item.name):
                    tasks = ", ".join(task for task, own in SECTION_OF.items() if own == section)
                    raise ConfigError(
                        Setting(f"{section}.{item.name}"), f": is for {tasks}, and this run's task is {self.task}. Leave it out."
                    )
