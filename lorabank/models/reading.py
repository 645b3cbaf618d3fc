"""What a model's folder holds, read by transformers: its configuration, tokenizer and weights, with faults said plainly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.errors import MissingExtraError, ModelError, first_line
from lorabank.wording import counted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class WeightsRead:
    """What the files had of a model's weights."""

    missing: Sequence[str]
    """Weights that they lack, sorted: random now."""
    other_shape: Sequence[str]
    """Weights that they have in another shape: random too."""
    unused: Sequence[str]
    """Weights of theirs that have no place in the model, sorted."""

    @property
    def notes(self) -> list[str]:
        """Sentences for the user."""
        if not self.unused:
            return []
        some = ", ".join(self.unused[:3])
        return [f"{counted(len(self.unused), 'weight')} of the file left out, without a place in the model ({some})"]


def config_of(name: str, folder: Path, settings: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """The configuration in a folder. `settings`: its config.json, as it is written. Raises ModelError."""
    from transformers import AutoConfig

    if "auto_map" in settings and not trust_remote_code and not _known_type(settings):
        raise ModelError(
            f"model {name!r}: it needs Python code that comes with its weights. "
            "If you trust its author, set trust_remote_code: true."
        )
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # wrong values in a config surface as whatever the model's config class happens to raise
        if not _known_type(settings):
            kind = settings.get("model_type")
            raise ModelError(
                f"model {name!r}: its config.json has model_type {kind!r}, which the installed transformers doesn't know. "
                "If the model is new: pip install -U transformers."
            ) from error
        raise ModelError(f"model {name!r}: its config.json can't be used ({first_line(error)}).") from error


def _known_type(settings: Mapping[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return settings.get("model_type") in CONFIG_MAPPING


def tokenizer_in(name: str, folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises ModelError."""
    from transformers import AutoTokenizer

    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
    if not any((folder / file).is_file() for file in known):
        raise ModelError(
            f"model {name!r}: {str(folder)!r} has no tokenizer. "
            "Copy tokenizer.json and tokenizer_config.json from the original model beside the weights."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except ImportError as error:
        raise lacks_package(name, error) from error
    except Exception as error:  # a damaged or exotic tokenizer surfaces as almost any class
        raise ModelError(
            f"model {name!r}: its tokenizer can't be read ({first_line(error)}). "
            "Copy the tokenizer's files again from the original model."
        ) from error


def fill_pad_token(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give the tokenizer a pad token if it has none, and say so; batches mask padding by length, so sharing one is safe."""
    if tokenizer.pad_token is not None:
        return []
    stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if stand_in is None:
        raise ModelError(
            "tokenizer: it has no pad, end, unknown or begin token to fill batches with. Set pad_token in its "
            "tokenizer_config.json."
        )
    tokenizer.pad_token = stand_in
    return [f"the tokenizer has no pad token: batches are filled with {stand_in!r} (masked by length, so its own meaning stays)"]


def weights_of(
    name: str, kind: Any, folder: Path, config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False, **more: Any
) -> tuple[PreTrainedModel, WeightsRead]:
    """The model in a folder, by a class of transformers or an automatic one, and what its files had of the weights.

    Safetensors alone are read, and nothing is fetched. `more`: further arguments of `from_pretrained`. Raises ModelError.
    """
    try:
        model, info = kind.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **more,
        )
    except ImportError as error:
        raise lacks_package(name, error) from error
    except Exception as error:  # a damaged file surfaces as one of a dozen classes of three libraries
        raise ModelError(
            f"model {name!r}: its weights can't be read ({first_line(error)}). Copy or download it again."
        ) from error
    other = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys") or ()]
    missing, unused = (tuple(sorted(info.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    return model, WeightsRead(missing=missing, other_shape=tuple(other), unused=unused)


def lacks_package(name: str, error: ImportError) -> MissingExtraError:
    """The error for a model that transformers reads with a library that isn't installed."""
    found = re.search(r"requires the (\S+) library|No module named '([\w.]+)'", str(error))
    if found is None:
        return MissingExtraError(f"model {name!r}: a package that it needs isn't installed ({first_line(error)}).")
    library = found.group(1) or found.group(2)
    package = "'lorabank[timm]'" if library.lower() == "timm" else library
    return MissingExtraError(f"model {name!r}: it needs {library}, which isn't installed: pip install {package}")


def incomplete(name: str, model: PreTrainedModel, missing: Sequence[str], way_out: str, *, therefore: str = "and") -> ModelError:
    """The error for weights that the files lack, which transformers would leave random."""
    some = ", ".join(missing[:3])
    return ModelError(
        f"model {name!r}: its files lack {len(missing)} of the weights of {type(model).__name__} ({some}), {therefore} "
        f"random ones would take their place. {way_out}"
    )
