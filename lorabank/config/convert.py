"""Values of other tools' keys in our terms. Each converter returns `{"section.field": value}`, or raises with the reason.

A converter that raises says only the reason: the caller puts the place in front of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from lorabank.config.inits import PREPARED, is_difference
from lorabank.errors import ConfigError

ROLE_WORDS = frozenset({"q", "k", "v", "o", "attention", "cross-attention", "mlp", "all-linear"})
"""Words that mean a role in our `targets`; in PEFT they are module names."""

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class OptimizerSteps:
    """A count of optimizer steps, to become forward passes once the accumulation is known."""

    steps: int


def truth(value: object) -> bool:
    """A yes or no, from YAML or the command line."""
    if isinstance(value, bool):
        return value
    if value is None:
        return False
    word = str(value).lower()
    if word not in _TRUE | _FALSE:
        raise ConfigError(f"expected true or false, got {value!r}")
    return word in _TRUE


def number(value: object) -> float:
    """A number, also from text such as `1e-4`."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan  # the message below names it
        if math.isfinite(found):
            return found
    raise ConfigError(f"expected a finite number, got {value!r}")


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    if isinstance(value, Sequence | set | frozenset) and all(isinstance(item, str) for item in value):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise ConfigError(f"expected module names, got {value!r}")


def _peft_selection(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if value == "all-linear":
            return value
        if not re.fullmatch(r"\[?[\w.\s,-]+\]?", value):
            return f"re:^(?:{value})$"  # PEFT takes a string as an expression for the whole path
    return tuple(rf"re:^(?:.*\.)?{re.escape(name)}$" if name in ROLE_WORDS - {"all-linear"} else name for name in _names(value))


def peft_targets(value: object) -> Mapping[str, object]:
    """PEFT's `target_modules`: names match the end of a path, a string is an expression for the whole path."""
    if value is None:
        raise ConfigError("not set, so PEFT would choose by the architecture's name. Set it, or use `targets: all-linear`")
    return {"adapter.targets": _peft_selection(value)}


def peft_exclude(value: object) -> Mapping[str, object]:
    """PEFT's `exclude_modules`, in the same language as its `target_modules`."""
    return {} if not value else {"adapter.exclude": _peft_selection(value)}


def factory_targets(value: object) -> Mapping[str, object]:
    """LLaMA-Factory's `lora_target`: names with commas, or `all`."""
    return {"adapter.targets": "all-linear"} if value == "all" else peft_targets(value)


def target_linear(value: object) -> Mapping[str, object]:
    """axolotl's `lora_target_linear: true` means every linear layer."""
    return {"adapter.targets": "all-linear"} if truth(value) else {}


def layers(value: object) -> Mapping[str, object]:
    """PEFT takes one index or a list."""
    return {"adapter.layers": [value] if isinstance(value, int) else value}


def peft_init(value: object) -> Mapping[str, object]:
    """PEFT's default is uniform in ±1/√in with B zero, `gaussian` has σ = 1/r: both are ours, and so are its other names here."""
    if value is None or value is True or str(value).lower() == "true":
        return {"adapter.init": "uniform"}
    if value is False or str(value).lower() == "false":
        raise ConfigError("false starts B at random numbers, so the adapter would change the model before training. Use true")
    name = str(value).lower()
    if name in ("gaussian", *PREPARED, "orthogonal") or is_difference(name):
        return {"adapter.init": name}
    raise ConfigError(f"{value!r} is not supported. There are true, gaussian, orthogonal, pissa, olora, eva and loftq")


_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"}


def schedule(value: object) -> Mapping[str, object]:
    """transformers' `constant` has no warm-up; ours has the warm-up that is set."""
    if value == "constant":
        return {"adapter.lr_scheduler": "constant", "adapter.warmup_steps": 0}
    return own_schedule(value)


def own_schedule(value: object) -> Mapping[str, object]:
    """Our `lr_scheduler`, with the names that others have for the same curves."""
    if isinstance(value, str) and value not in _SCHEDULES and value in _OTHER_SCHEDULES:
        raise ConfigError(f"the schedule {value!r} is not supported. There are constant, linear and cosine")
    return {"adapter.lr_scheduler": _SCHEDULES.get(value, value) if isinstance(value, str) else value}


_OTHER_SCHEDULES = frozenset(
    [
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "one_cycle",
        "rex",
        "adafactor",
        "piecewise_constant",
    ]
)

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "lion_32bit": "lion",
}


def optimizer(value: object) -> Mapping[str, object]:
    """Names of the same optimizer elsewhere. One with another state or another rule is refused."""
    name = str(value).lower()
    if "8bit" in name or name.startswith("paged"):
        raise ConfigError(
            f"{value!r}: an optimizer state in 8 bits or in paged memory is not supported. An adapter's state is small: use adamw"
        )
    return {"adapter.optimizer": _OPTIMIZERS.get(name, value)}


def max_steps(value: object) -> Mapping[str, object]:
    """-1 means no limit in transformers."""
    return {"adapter.max_steps": None if value is None or str(value) in ("-1", "none", "null") else value}


def warmup_steps(value: object) -> Mapping[str, object]:
    """A number between 0 and 1 is a share of the steps, in transformers 5 and kohya."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return {"adapter.warmup_steps": None}
    return {"adapter.warmup_ratio": number(value)} if 0 < number(value) < 1 else {"adapter.warmup_steps": value}


_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "f32": "fp32",
    "float": "fp32",
}


def dtype_name(text: str) -> str:
    """Our name of a storage that may be spelled as torch or GGUF do (`torch.bfloat16`, `f16`); another text as it is."""
    plain = text.strip().lower().removeprefix("torch.")
    return _DTYPES.get(plain, plain)


def dtype(value: object) -> Mapping[str, object]:
    """torch's names for the storage of the base."""
    name = str(value).removeprefix("torch.")
    return {"run.base_dtype": _DTYPES.get(name, value)}


def bf16(value: object) -> Mapping[str, object]:
    """`bf16: true` elsewhere is mixed precision; the frozen base is then stored in bf16, adapters stay fp32."""
    if value == "auto":
        return {"run.base_dtype": "auto"}
    return {"run.base_dtype": "bf16"} if truth(value) else {}


def fp16(value: object) -> Mapping[str, object]:
    """`fp16: true` elsewhere is mixed precision; the frozen base is then stored in fp16, adapters stay fp32."""
    if value == "auto":
        return {"run.base_dtype": "auto"}
    return {"run.base_dtype": "fp16"} if truth(value) else {}


def torch_compile(value: object) -> Mapping[str, object]:
    """transformers' switch, and axolotl's `auto`."""
    return {"run.compile": None if value == "auto" else truth(value)}


def use_cpu(value: object) -> Mapping[str, object]:
    """transformers' switch for the CPU."""
    return {"run.device": "cpu"} if truth(value) else {}


def report_to(value: object) -> Mapping[str, object]:
    """transformers' `none` and `all`."""
    if value in (None, "none", ["none"]):
        return {"run.report_to": ()}
    if value in ("all", ["all"]):
        raise ConfigError("'all' depends on what is installed. Name the trackers: tensorboard, wandb, trackio, mlflow")
    return {"run.report_to": value}


def train_on_inputs(value: object) -> Mapping[str, object]:
    """axolotl: whether the prompt is trained on too."""
    return {"data.train_on": "all"} if truth(value) else {}


def completion_only(value: object) -> Mapping[str, object]:
    """TRL: null leaves it to the row's form, as ours does."""
    return {} if value is None else {"data.train_on": "completion" if truth(value) else "all"}


def assistant_only(value: object) -> Mapping[str, object]:
    """TRL: false trains on every token of a conversation."""
    return {} if value is None else {"data.train_on": "assistant" if truth(value) else "all"}


def _steps(field: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    count = number(value)
    if count < 1:
        raise ConfigError(
            f"a share of the run ({value!r}) is not supported, since adapters have lengths of their own. Use `{field}: N`"
        )
    if count != int(count):
        raise ConfigError(f"expected a whole number, got {value!r}")
    return {field: OptimizerSteps(int(count))}


def eval_steps(value: object) -> Mapping[str, object]:
    """Optimizer steps between evaluations; `eval.every` counts forward passes."""
    return _steps("eval.every", value)


def save_steps(value: object) -> Mapping[str, object]:
    """Optimizer steps between checkpoints; `save.every` counts forward passes."""
    return _steps("save.every", value)


def _strategy(field: str, value: object) -> Mapping[str, object]:
    if value is False or str(value) == "no":
        return {field: 0}
    if str(value) == "steps":
        return {}
    raise ConfigError(f"{value!r} is not supported, since adapters have epochs of their own. Use `{field}: N` (forward passes)")


def eval_strategy(value: object) -> Mapping[str, object]:
    """`steps` or `no`."""
    return _strategy("eval.every", value)


def save_strategy(value: object) -> Mapping[str, object]:
    """`steps` or `no`."""
    return _strategy("save.every", value)


def check_adapter_kind(value: object) -> Mapping[str, object]:
    """axolotl's `adapter:` names the method."""
    if value in (None, "lora"):
        return {}
    extra = "a quantised base is asked for as `base_dtype: nf4`, beside `adapter: lora`. " if value == "qlora" else ""
    raise ConfigError(f"{value!r}: {extra}lorabank trains LoRA; adapters are listed under `adapters:`")


def check_best_metric(value: object) -> Mapping[str, object]:
    """The best step is chosen by validation loss."""
    if value in (None, "loss", "eval_loss"):
        return {}
    raise ConfigError(f"{value!r}: the best step is the one of the lowest validation loss. Leave it out")


def check_off(value: object) -> Mapping[str, object]:
    """Preference and reinforcement training."""
    if not value:
        return {}
    raise ConfigError(f"{value!r}: only supervised training is supported yet")


_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_task_type(value: object) -> Mapping[str, object]:
    """PEFT trains a head in full for classification tasks."""
    name = str(value.value if isinstance(value, Enum) else value)
    if name in _HEAD_TASKS:
        raise ConfigError(f"{name} trains the model's head in full beside the adapter, which is not supported yet. Use CAUSAL_LM")
    return {}
