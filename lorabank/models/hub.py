"""A base model from the hub: looked at before it is downloaded, and said plainly when it can't be had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.errors import ModelError, closest
from lorabank.models.folder import check_files
from lorabank.models.names import ALIASES, SMOLLM2, closest_sibling

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

PROBE_SECONDS = 10.0
_WANTED: tuple[str, ...] = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
    "*.spm",
)


def fetch(name: str, *, trust_remote_code: bool = False) -> Path:
    """The local snapshot folder of hub id `name`, downloaded unless the hub's cache has it.

    The repository's list of files is checked first, so that a model that can't be used isn't downloaded.
    Raises ModelError when the id doesn't exist, is gated, or the hub can't be reached and nothing is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    info = look(name)
    if isinstance(info, Path):
        return info
    files = [sibling.rfilename for sibling in info.siblings or []]
    check_files(files, repr(name), adapter_base=None)
    patterns: list[str] = [*_WANTED, *(("*.py",) if trust_remote_code else ())]
    try:
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ModelError(_gated(name)) from error
    except OSError as error:
        raise ModelError(
            f"model {name!r}: the download failed ({error}). Run the same command again: it goes on where it stopped."
        ) from error


def look(name: str) -> ModelInfo | Path:
    """What the hub says of an id, or, where it can't be reached, the snapshot in the hub's cache. Downloads nothing.

    Raises ModelError as `fetch` does.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().model_info(name, timeout=PROBE_SECONDS)
    except GatedRepoError as error:
        raise ModelError(_gated(name)) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model {name!r}: no such model on the hub, and no such folder here{_hint(name)}. "
            "Check the spelling of owner and model; a private one needs `hf auth login`."
        ) from error
    except HFValidationError as error:
        hint = _hint(name)
        raise ModelError(
            f"model {name!r}: neither a folder, a GGUF file nor a hub id such as 'Qwen/Qwen3-0.6B'{hint}."
        ) from error
    except Exception as error:  # the hub client's transport errors have another class in each of its major versions
        cached = _cached(name)
        if cached is None:
            raise ModelError(
                f"model {name!r}: no such folder here{_hint(name)}, and the hub can't be reached "
                f"({type(error).__name__}: {error}). "
                f"Name a local folder or GGUF file, or use {SMOLLM2!r}, which comes from the package index."
            ) from error
        return cached


def _cached(name: str) -> Path | None:
    """The snapshot that the hub's own cache holds, for work without a network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _gated(name: str) -> str:
    return (
        f"model {name!r}: gated: its owner wants you to accept terms first. Accept them on the model's hub page, "
        "then run `hf auth login`."
    )


def _hint(name: str) -> str:
    return closest_sibling(Path(name)) or closest(name, ALIASES)
