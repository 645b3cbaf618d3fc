"""Latents and text conditions, made once: kept in memory, or in files that another run finds again.

A key holds all that a value depends on: the picture's bytes and how it is cropped (or the caption), the weights and configuration
of the model that makes it. So a changed file, model or setting has another key; nothing is ever looked up by a path or a date.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabank.errors import AdapterFileError
from lorabank.formats.files import read_tensors, write_tensors
from lorabank.notices import warn_once
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.pictures import Picture

Values = Mapping[str, Tensor]
Busy = Callable[[str, int, int], None]
KEPT = "lorabank"
"""Metadata of a cache file: its key, so that a file under another's name isn't taken for it."""
SUM = "lorabank.sum"
"""Metadata: a checksum of the values."""


class Cache:
    """Values by key."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: None keeps them in memory alone."""
        self.folder = folder
        self._held: dict[str, Values] = {}

    def get(self, key: str) -> Values | None:
        """What was put there; None where there is nothing, or a file that can't be read."""
        if key in self._held:
            return self._held[key]
        if self.folder is None or not (path := self._path(key)).is_file():
            return None
        try:
            values, metadata = read_tensors(path)
        except AdapterFileError as error:
            warn_once(f"a file of the cache can't be read, so it is made again: {error}")
            return None
        if metadata.get(KEPT) != key:
            return None
        if metadata.get(SUM) != _sum(values):
            warn_once(f"a file of the cache isn't what was written there, so it is made again: {path}")
            return None
        return values

    def put(self, key: str, values: Values) -> None:
        """Keep it. Raises OutputError for a folder that can't be written."""
        if self.folder is None:
            self._held[key] = values
            return
        write_tensors(
            self._path(key), {name: value.contiguous() for name, value in values.items()}, {KEPT: key, SUM: _sum(values)}
        )

    def _path(self, key: str) -> Path:
        assert self.folder is not None  # the callers looked
        return self.folder / key[:2] / f"{key}.safetensors"


class Encoded:
    """A model's latents of pictures and conditions of captions."""

    def __init__(self, model: ImageModel, cache: Cache | None) -> None:
        """`cache`: None makes everything anew each time."""
        self.model, self.cache = model, cache
        self._identities: dict[str, str] = {}

    def latents(self, picture: Picture) -> Tensor:
        """fp32 (C, H, W) on the host."""
        key = self._key("latents", picture.digest, picture.fit)
        found = None if self.cache is None else self.cache.get(key)
        if found is None:
            pixels = torch.from_numpy(np.asarray(picture.load()).copy()).permute(2, 0, 1)[None].float() / 255
            found = {"latents": self.model.latents(pixels)[0]}
            if self.cache is not None:
                self.cache.put(key, found)
        return found["latents"]

    def condition(self, caption: str) -> Values:
        """One row's, without the dimension of rows, on the host."""
        key = self._key("text", caption)
        found = None if self.cache is None else self.cache.get(key)
        if found is None:
            with torch.no_grad():
                made = self.model.encode(self.model.tokenize([caption]))
            found = {name: value[0].cpu() for name, value in made.items()}
            if self.cache is not None:
                self.cache.put(key, found)
        return found

    def prepare(self, pictures: Sequence[Picture], captions: Sequence[str], busy: Busy) -> None:
        """Make all of them now, with progress, rather than in the first epoch."""
        if self.cache is None:
            return
        for number, picture in enumerate(pictures, start=1):
            self.latents(picture)
            busy("latents", number, len(pictures))
        for number, caption in enumerate(captions, start=1):
            self.condition(caption)
            busy("captions", number, len(captions))

    def _key(self, what: str, *of: object) -> str:
        if what not in self._identities:
            parts = self.model.parts
            made_by = {"vae": self.model.vae} if what == "latents" else {n: parts.get(n) for n in self.model.family.encoders}
            named = [(name, identity(module)) for name, module in made_by.items()]
            more = [] if what == "latents" else [str(self.model.dtype), *map(_about, self.model.tokenizers.values())]
            self._identities[what] = repr((what, self.model.family.name, named, more))
        return hashlib.sha256(repr((self._identities[what], of)).encode()).hexdigest()


def _sum(values: Values) -> str:
    """crc32 of all bytes, by name."""
    found = 0
    for name in sorted(values):
        found = zlib.crc32(values[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def identity(module: nn.Module | None) -> str:
    """A digest of a model's configuration and of every weight."""
    digest = hashlib.sha256()
    if module is None:
        return "none"
    config: Any = getattr(module, "config", None)
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    plain = {key: value for key, value in settings.items() if not key.startswith("_")}
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _about(tokenizer: Any) -> str:
    """What a caption's ids depend on."""
    return (
        f"{type(tokenizer).__name__} {len(tokenizer)} {tokenizer.model_max_length} {sorted(tokenizer.get_vocab().items())[:64]}"
    )
