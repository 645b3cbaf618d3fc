"""`load_base`: a base model and its tokenizer from a hub id, a folder, a GGUF file or an alias."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabank.config.paths import expanded
from lorabank.errors import ConfigError, ModelError, closest
from lorabank.models import hub
from lorabank.models.cache import Say, default_cache
from lorabank.models.folder import check_folder, foreign_framework, is_pickled, not_pytorch
from lorabank.models.gguf import convert_gguf, source_note
from lorabank.models.names import WHISPER_TINY_EN, alias, check_not_closed, closest_sibling, is_hub_id, is_path
from lorabank.models.quiet import quiet_transformers
from lorabank.models.reading import config_of, fill_pad_token, incomplete, tokenizer_in, weights_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "fp32", "bf16", "fp16", "fp8", "nf4")
QUANTIZED = ("fp8", "nf4")
"""Storages of the linear layers alone; the rest is then kept in the dtype of `auto`."""


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A base model ready to be attached to, and what was decided while loading it."""

    model: PreTrainedModel
    """In eval mode, on `device`, every floating weight in `dtype`, quantised ones aside."""
    tokenizer: PreTrainedTokenizerBase
    """Has a pad token; its padding side is as it came."""
    name: str
    """As it was asked for: what other tools should load below the adapter."""
    folder: Path
    """Where the weights were read."""
    dtype: torch.dtype
    device: torch.device
    has_chat_template: bool
    notes: tuple[str, ...] = ()
    """Sentences for the user: what was filled in, left out or can't be trusted fully."""


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> LoadedBase:
    """Load the causal language model `name` (hub id, folder, GGUF file, or alias such as `smollm2-135m-instruct`).

    `dtype`: `fp32`, `bf16`, or `auto` (bf16 on a GPU that has it, else fp32); `fp8` and `nf4` are `auto` with the linear layers
    quantised, one after the other, as `quantize_base` does. `device`: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`.
    `cache`: where converted models are kept (default `~/.cache/lorabank`). `say` gets progress lines of a download or conversion.
    Raises ModelError when the model can't be had or isn't one that can be adapted, ConfigError for a wrong dtype or device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lorabank.bank.storages.quantized import quantize_base
    from lorabank.models.dtypes import dtype_notes

    where = pick_device(device)
    number = pick_dtype(dtype, where)
    folder = locate(name, cache=cache, trust_remote_code=trust_remote_code, say=say)
    settings = check_folder(folder)
    with quiet_transformers():
        config = config_of(name, folder, settings, trust_remote_code=trust_remote_code)
        _check_causal(name, config, settings, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_in(name, folder, trust_remote_code=trust_remote_code)
        model, info = weights_of(name, AutoModelForCausalLM, folder, config, dtype=number, trust_remote_code=trust_remote_code)
    if info.missing:
        raise incomplete(name, model, info.missing, "Use a complete checkpoint with the language-model head.")
    said: list[str] = []
    if dtype in QUANTIZED:
        quantize_base(model, dtype, device=where, say=said.append)
    torch.nn.Module.to(model, where)  # PreTrainedModel's own `to` only refuses quantized models, and is typed wrongly
    told = dtype_notes(dtype, number, where)
    notes = [
        *_source_notes(folder),
        *told,
        *said,
        *fill_pad_token(tokenizer),
        *_check_vocabulary(tokenizer, model),
        *info.notes,
    ]
    return LoadedBase(
        model=model.eval(),
        tokenizer=tokenizer,
        name=name,
        folder=folder,
        dtype=number,
        device=where,
        has_chat_template=bool(tokenizer.chat_template),
        notes=tuple(notes),
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False, cache: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `name` alone: enough to show rows, without the weights' memory. Raises ModelError."""
    folder = locate(name, cache=cache, trust_remote_code=trust_remote_code)
    check_folder(folder)
    with quiet_transformers():
        tokenizer = tokenizer_in(name, folder, trust_remote_code=trust_remote_code)
        fill_pad_token(tokenizer)
    return tokenizer


def locate(name: str, *, cache: Path | None = None, trust_remote_code: bool = False, say: Say = lambda line: None) -> Path:
    """The local folder for a model's name; downloads or converts where needed. Raises ModelError."""
    if not name.strip():
        raise ModelError("model: no name given. Use a hub id, a folder, a GGUF file, or 'smollm2-135m-instruct'.")
    path = expanded(name, place="model", kind=ModelError)
    if path.is_dir():
        return path
    if path.is_file():
        return _locate_file(path, cache or default_cache(), say)
    if (known := alias(name)) == WHISPER_TINY_EN:
        from lorabank.models.whisper_ct2 import whisper_folder

        return whisper_folder(cache, say=say)
    if known:
        from lorabank.models.smollm2 import smollm2_folder  # also run as `python -m`, so not imported with the package

        return smollm2_folder(cache, say=say)
    check_name(name)
    return hub.fetch(name, trust_remote_code=trust_remote_code)


def check_name(name: str) -> None:
    """Raise ModelError for what is no folder or file here, no alias and no hub id by its form. Fetches nothing."""
    path = expanded(name, place="model", kind=ModelError)
    if path.exists() or alias(name):
        return
    check_not_closed(name)
    if is_path(name) or (path.parent != Path() and path.parent.is_dir() and closest_sibling(path)):
        raise ModelError(f"model {name!r}: no such folder or file{closest_sibling(path)}.")
    if not is_hub_id(name):
        hint = closest_sibling(path)
        raise ModelError(f"model {name!r}: neither a folder, a GGUF file nor a hub id such as 'Qwen/Qwen3-0.6B'{hint}.")


def check_there(name: str) -> None:
    """Raise ModelError for what can't be had: as `check_name`, and where neither the hub nor its cache has such a model."""
    check_name(name)
    if not expanded(name, place="model", kind=ModelError).exists() and alias(name) is None:
        hub.look(name)


def _locate_file(path: Path, cache: Path, say: Say) -> Path:
    if path.suffix.lower() == ".gguf":
        say(f"converting {path.name} to safetensors, once ...")
        return convert_gguf(path, cache)
    where = repr(str(path))
    framework = foreign_framework(path.name)
    if framework:
        raise ModelError(not_pytorch(where, path.name, framework))
    if is_pickled(path.name):
        raise ModelError(
            f"model {where}: a pickled weight file; only safetensors are read, from a folder that also holds "
            "config.json and the tokenizer."
        )
    raise ModelError(
        f"model {where}: a single file. Name the folder that holds it, with config.json and the tokenizer: {str(path.parent)!r}."
    )


def pick_device(device: str) -> torch.device:
    """The torch device for a setting; `auto` takes a GPU if there is one. Raises ConfigError when it isn't there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        hint = closest(device, ("cpu", "cuda", "mps", "auto"))
        raise ConfigError(f"device: expected cpu, cuda, cuda:N, mps or auto, got {device!r}{hint}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {device!r} asked for, but torch {torch.__version__} sees no GPU here. "
            "Use device cpu, or install a CUDA build of torch."
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} asked for, but there are {torch.cuda.device_count()} GPUs, numbered from 0.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: 'mps' asked for, but torch sees no Apple GPU here. Use device cpu.")
    return found


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for a storage on a device; for `fp8` and `nf4`, of what isn't quantised. Raises ConfigError for another."""
    import torch

    from lorabank.kernels.gpu import runtime

    if dtype not in DTYPES:
        raise ConfigError(f"base_dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}{closest(dtype, DTYPES)}")
    if dtype == "auto" or dtype in QUANTIZED:
        # torch's own question, is_bf16_supported, is answered yes by GPUs that only emulate it
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if runtime.bf16_missing(device) is None else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


OTHER_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "ForConditionalGeneration": "summarization, translation or text2text-generation",
}
"""End of a class's name to the tasks that such a model is for; the first that fits."""


def _other_task(stored: Collection[str]) -> str:
    """What a checkpoint of another class may be for."""
    found = next((task for end, task in OTHER_TASKS.items() if any(name.endswith(end) for name in stored)), None)
    if found is not None:
        return f"this one is for task {found} (`task` in a run, or --task)"
    return "others have tasks of their own (--task), or are adapted and merged in Python (lb.attach, lb.merge)"


def _check_causal(name: str, config: Any, settings: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raise ModelError unless the checkpoint is of a model that continues text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if trust_remote_code and "AutoModelForCausalLM" in settings.get("auto_map", {}):
        return
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    causal: Collection[str] = (listed,) if isinstance(listed, str) else listed
    stored = settings.get("architectures") or list(causal)
    if any(architecture in causal for architecture in stored):
        return
    what = "an encoder-decoder model" if getattr(config, "is_encoder_decoder", False) else "not a model that continues text"
    expected = f"expected {' or '.join(causal)}" if causal else f"model_type {config.model_type!r} has no causal language model"
    raise ModelError(
        f"model {name!r}: {', '.join(stored) or config.model_type} is {what} ({expected}). "
        f"Task text-generation needs a decoder, such as Qwen, Llama or GPT-2; {_other_task(stored)}."
    )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    rows = cast("torch.Tensor", model.get_input_embeddings().weight).shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest < rows:
        return []
    return [f"the tokenizer knows tokens up to id {highest}, and the model {rows} of them: text with the ids above that fails"]


def _source_notes(folder: Path) -> list[str]:
    note = source_note(folder)
    return [note] if note else []
