"""Tiny picture models under two adapters: convolutions, and windows that a row is split into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as hf

from lorabank import AdapterBank, AdapterConfig, attach

EVEN, PADDED = 16, 12
"""Pictures of 4 × 4 patches, which Swin's windows of 2 × 2 take whole, and of 3 × 3, which they don't."""


def filled(model: Any, **config: Any) -> AdapterBank:
    """A bank over it, each adapter doing something."""
    bank = attach(model.eval())
    for seed, name in enumerate("ab"):
        bank.add(name, AdapterConfig(rank=2, **config), seed=seed)
        with torch.no_grad():
            for leaf in bank.parameters(name):
                leaf.add_(0.2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    return bank


def resnet() -> AdapterBank:
    """All convolutions, and a head of each adapter's own."""
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    return filled(hf.ResNetForImageClassification(config), targets=["convolution"], modules_to_save=["classifier"])


def swin(size: int, targets: Sequence[str] = ("q_proj",)) -> AdapterBank:
    """One stage of two layers, the second with windows that are shifted."""
    torch.manual_seed(0)
    config = hf.SwinConfig(
        image_size=size, patch_size=4, embed_dim=8, depths=[2], num_heads=[1], window_size=2, mlp_ratio=1.0, drop_path_rate=0.0
    )
    return filled(hf.SwinModel(config, add_pooling_layer=False), targets=list(targets))


MADE: Mapping[str, tuple[Callable[[], AdapterBank], int]] = {
    "resnet": (resnet, 32),
    "swin": (lambda: swin(EVEN), EVEN),
    "swin, padded": (lambda: swin(PADDED), PADDED),
    "swin, all layers": (lambda: swin(EVEN, ["all-linear"]), EVEN),
}
"""A bank, and the pixels a side of its pictures."""
