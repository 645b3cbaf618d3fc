"""A GGUF file (llama.cpp's format) as a transformers folder: dequantized once, kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.errors import MissingExtraError, ModelError, first_line
from lorabank.models.cache import build_folder
from lorabank.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE_FILE = "lorabank_source.json"
CONVERSION = 1
"""Raised when the conversion changes what it writes, so that older cached folders are not used."""
MAGIC = b"GGUF"


def convert_gguf(file: Path, cache: Path) -> Path:
    """The cached safetensors folder of a GGUF file, converted on first use.

    Weights become fp32: every block's value is a product of an fp16 scale and a small integer, which fp32 holds exactly.
    Raises ModelError for a broken file or an architecture that can't be read, MissingExtraError without the `gguf` library.
    """
    check_gguf(file)
    stat = file.stat()
    identity = f"{CONVERSION}:{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = cache / "models" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return build_folder(target, lambda folder: write_folder(file, folder, source=file.name))


def check_gguf(file: Path) -> None:
    """Raise ModelError unless the file begins as a GGUF file does."""
    with file.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if start != MAGIC:
        raise ModelError(
            f"model {str(file)!r}: not a GGUF file (it begins with {start!r}, expected {MAGIC!r}). Was the download cut short?"
        )


def write_folder(file: Path, folder: Path, *, source: str, name: str | None = None) -> None:
    """Write a GGUF file's model, tokenizer, chat template and generation settings into `folder` as transformers keeps them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(f"reading GGUF files needs {library!r}, which isn't installed: pip install 'lorabank[gguf]'")
    header = _header(file)
    try:
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # the conversion's bar heeds no setting of transformers
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype="float32")
    except Exception as error:  # the tokenizers library raises bare Exceptions for a vocabulary that doesn't fit
        raise ModelError(
            f"model {str(file)!r}: transformers can't read this GGUF ({header['architecture']!r}; "
            f"{first_line(error)}). Use the model's safetensors release."
        ) from error
    _mend_tokenizer(tokenizer, header)
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    plain = _without_quantization(
        model, name or file.stem, {f"{token}_token_id": i for token, i in header["special_ids"].items()}
    )
    with quiet_transformers():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    record = {"source": source, "conversion": CONVERSION, **header}
    (folder / SOURCE_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _header(file: Path) -> dict[str, Any]:
    """What the file says of itself: architecture, pre-tokenizer, ids of special tokens, storage types of its tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
        types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(
            f"model {str(file)!r}: the GGUF file is damaged ({first_line(error)}). Copy or download it again."
        ) from error
    values: dict[str, str] = {}
    keys = {"architecture": "general.architecture", "tokenizer": "tokenizer.ggml.model", "pre_tokenizer": "tokenizer.ggml.pre"}
    for label, key in keys.items():
        field = reader.get_field(key)
        values[label] = str(field.contents()) if field is not None else ""
    ids: dict[str, int] = {}
    for token, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            ids[token] = int(field.contents())
    return {**values, "special_ids": ids, "tensor_types": types}


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any]) -> None:
    """Put right what transformers loses of a tokenizer on the way out of a GGUF file.

    5.10 takes the begin token for the end token, and decodes byte-level text with spaces "cleaned up". A file names the rule
    that splits text before merging and doesn't hold it: for SmolLM's (digits apart, then GPT-2's) the plain GPT-2 one comes back.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for token, index in header["special_ids"].items():
        setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(index))
    tokenizer.clean_up_tokenization_spaces = False
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    if header["tokenizer"] == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if header["pre_tokenizer"] == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _without_quantization(model: PreTrainedModel, name: str, special_ids: Mapping[str, int]) -> PreTrainedModel:
    """The same weights in a model that doesn't call itself quantized and knows its special tokens; no weight is copied."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = {
        key: value for key, value in model.config.to_dict().items() if key not in ("quantization_config", "_model_name_or_path")
    }
    for key in ("rms_norm_eps", "layer_norm_epsilon"):
        if isinstance(settings.get(key), float):
            settings[key] = float(f"{settings[key]:.7g}")  # kept as fp32 in the file: 9.99999975e-06 for 1e-05
    config = type(model.config).from_dict(
        settings | dict(special_ids) | {"_name_or_path": name, "architectures": [type(model).__name__]}
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**special_ids)
    return plain


def source_note(folder: Path) -> str | None:
    """One sentence on where a converted folder came from, or None for a folder that isn't one of ours."""
    path = folder / SOURCE_FILE
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"weights dequantized to fp32 from {record['source']} ({', '.join(record['tensor_types'])}); the tokenizer "
        "is rebuilt from the same file"
    )
