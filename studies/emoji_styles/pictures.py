"""The prepared pictures, their names, and which names are held out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from grid import held_out_names
from torch import Tensor

BASE, STYLES = "noto", ("openmoji", "fluent")
TEXT = 3.0
"""MiniLM's numbers are about a third of the usual size."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All of the sets' pictures of the same icons."""

    pixels: Mapping[str, Tensor]
    """Style → uint8 (N, 3, S, S)."""
    text_NLD: Tensor
    captions: Sequence[str]
    weights_N: Tensor
    """Of each icon in training: icons that differ in the tone of skin count as one. 0 for those held out."""
    held: Sequence[int]
    """One icon of each name held out."""

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.pixels[BASE].shape[-1]

    def clean(self, style: str, rows: slice | Tensor | Sequence[int]) -> Tensor:
        """fp32 in [−1, 1]."""
        return self.pixels[style][rows].float() / 127.5 - 1.0


def pictures_of(path: Path, share: float, *, match: str | None = None, pool: int = 1) -> Pictures:
    """`share` of the names held out; of icons whose whole names `match`; `pool` pixels a side averaged into one."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run studies/emoji_styles/prepare.py first")
    with np.load(path) as file:
        styles, concepts = file["styles"].tolist(), file["concepts"].tolist()
        pixels = {style: torch.from_numpy(file["pictures"][i]).permute(0, 3, 1, 2).contiguous() for i, style in enumerate(styles)}
        text, captions = with_mean(torch.from_numpy(file["text"]).float() * TEXT), file["captions"].tolist()
    kept = [i for i, caption in enumerate(captions) if match is None or re.fullmatch(match, caption)]
    captions, concepts, text = [captions[i] for i in kept], [concepts[i] for i in kept], text[kept]
    pixels = {style: F.avg_pool2d(each[kept].float(), pool).round().byte() for style, each in pixels.items()}
    held = held_out_names(concepts, share)
    counts = {name: concepts.count(name) for name in set(concepts)}
    weights = torch.tensor([0.0 if name in held else 1.0 / counts[name] for name in concepts])
    first = {name: concepts.index(name) for name in held}
    return Pictures(pixels=pixels, text_NLD=text, captions=captions, weights_N=weights, held=[first[name] for name in held])


def with_mean(text_NLD: Tensor) -> Tensor:
    """Before a name's tokens their mean, at the tokens' size: what the whole picture is like, in one place."""
    held = (text_NLD != 0).any(-1, keepdim=True)
    mean = text_NLD.sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([mean * text_NLD[held.expand_as(text_NLD)].std() / mean.std(), text_NLD], 1)
