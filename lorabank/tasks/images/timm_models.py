"""Models of timm, an extra: it needs a torchvision that fits the installed torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorabank.errors import MissingExtraError, ModelError, first_line

TIMM = "timm:"
"""Begins the name of a model of timm's, as `timm:resnet18.a1_in1k`."""


def timm_model(name: str, *, pretrained: bool) -> nn.Module:
    """The model that `timm:NAME` names. Raises MissingExtraError, ModelError."""
    timm = import_timm(name)
    try:
        return timm.create_model(name.removeprefix(TIMM), pretrained=pretrained)
    except Exception as error:  # unknown names, the hub, damaged files: timm raises many kinds
        raise ModelError(f"model {name!r}: timm can't make it ({first_line(error)}). See timm.list_models().") from error


def import_timm(name: str) -> Any:
    """The library. Raises MissingExtraError where it can't be imported."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
        import timm.data  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # a torchvision that doesn't fit its torch raises the latter
        raise MissingExtraError(
            f"model {name!r}: needs timm, and a torchvision that fits your torch: pip install 'lorabank[timm]' ({error})"
        ) from error
    return timm
