"""Checks of a model folder, or of a hub repository's list of files, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorabank.errors import ModelError

_FOREIGN = (
    ("saved_model.pb", "TensorFlow"),
    (".ckpt.index", "TensorFlow"),
    ("tf_model.h5", "TensorFlow"),
    (".tflite", "TensorFlow"),
    (".h5", "Keras"),
    (".keras", "Keras"),
    (".msgpack", "Flax"),
    (".onnx", "ONNX"),
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


def foreign_framework(name: str) -> str | None:
    """The framework other than PyTorch that a file of this name belongs to, or None."""
    return next((framework for ending, framework in _FOREIGN if name.lower().endswith(ending)), None)


def is_pickled(name: str) -> bool:
    """Whether a file of this name holds pickled weights."""
    return name.lower().endswith(_PICKLED) and Path(name).name not in _NOT_WEIGHTS and not Path(name).name.startswith("rng_state")


def check_files(files: Collection[str], where: str, *, adapter_base: str | None = None) -> None:
    """Raise ModelError unless `files` (paths relative to the folder) hold a PyTorch model in safetensors.

    `where` names the folder or repository in messages; `adapter_base` the base that an adapter's config names.
    """
    top = {name for name in files if "/" not in name}
    if "adapter_config.json" in top and "config.json" not in top:
        base = (
            f"its base is {adapter_base!r}: use that as the model"
            if adapter_base
            else "use the base model that it was trained on"
        )
        raise ModelError(
            f"model {where}: this is a LoRA adapter, not a model; {base}, and load the adapter onto it with "
            "bank.load or --init-from."
        )
    if any(name.endswith(".safetensors") and not name.startswith("adapter_model") for name in top) and "config.json" in top:
        return
    foreign = [(name, framework) for name in sorted(files) if (framework := foreign_framework(name))]
    pickled = [name for name in sorted(top) if is_pickled(name)]
    if pickled:
        raise ModelError(
            f"model {where}: {pickled[0]} is a pickle, which can run code when it's opened; only safetensors are read. "
            "If you trust it, convert it once, and copy the tokenizer's files: "
            "AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)."
        )
    if foreign:
        name, framework = foreign[0]
        raise ModelError(not_pytorch(where, name, framework))
    if "config.json" not in top:
        raise ModelError(_no_config(files, where))
    raise ModelError(
        f"model {where}: there is a config.json but no .safetensors file beside it, so there are no weights. Was the "
        "download or copy cut short?"
    )


def not_pytorch(where: str, file: str, framework: str) -> str:
    """The sentence for a checkpoint of another framework."""
    return (
        f"model {where}: {file} is a {framework} checkpoint, and lorabank adapts PyTorch models only. Use the model's "
        "PyTorch release (.safetensors), or convert it first, with transformers 4: "
        "from_pretrained(folder, from_tf=True or from_flax=True).save_pretrained(new_folder)."
    )


def _no_config(files: Collection[str], where: str) -> str:
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
    if ggufs:
        return (
            f"model {where}: it holds GGUF files only ({', '.join(ggufs[:4])}). Name the file itself as the model, "
            "downloaded if it is on the hub."
        )
    nested = sorted(name for name in files if name.endswith("/adapter_config.json"))
    if nested:
        return (
            f"model {where}: this looks like a run's output (it holds adapters: "
            f"{', '.join(name.split('/')[0] for name in nested[:4])}), not a base model."
        )
    if "model_index.json" in files:  # its parts have a config.json each
        return (
            f"model {where}: this is a diffusers pipeline (model_index.json), not a model of transformers. It trains and draws "
            "with task text-to-image, and `lorabank merge` takes adapters whose layers begin with one of its parts (`unet.` …)."
        )
    models = sorted(name for name in files if name.endswith("/config.json"))
    if models:
        return f"model {where}: no config.json in it, but in {models[0].rpartition('/')[0]!r} inside it. Name that folder."
    return f"model {where}: no config.json in it, so it isn't a model folder in transformers' format."


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict. Raises ModelError unless the folder holds a PyTorch model that can be adapted."""
    files = {path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()}
    where = repr(str(folder))
    check_files(files, where, adapter_base=_adapter_base(folder))
    _check_shards(folder, where)
    config = read_json(folder / "config.json", where)
    check_config(config, where)
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError when a config says that the weights are quantized."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelError(
            f"model {where}: its weights are quantized ({method}), which can't be adapted yet. Use the model's bf16 "
            "or fp32 release."
        )


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises ModelError when it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {where}: {path.name} can't be read ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {where}: {path.name} should hold a JSON object, and holds a {type(value).__name__}.")
    return value


def _adapter_base(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_json(path, repr(str(folder))).get("base_model_name_or_path")
    return str(base) if base else None


def _check_shards(folder: Path, where: str) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    shards = read_json(index, where).get("weight_map", {})
    missing = sorted({name for name in shards.values() if not (folder / name).is_file()})
    if missing:
        raise ModelError(
            f"model {where}: {len(missing)} of its weight files are missing ({', '.join(missing[:3])}). Copy or "
            "download it again."
        )
