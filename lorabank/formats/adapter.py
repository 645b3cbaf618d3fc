"""`Adapter`: the trained tensors of one adapter as a value, apart from any model or slot.

Shapes: A (rank, in), B (out, rank), so that ΔW = scaling · B @ A has the shape (out, in) of the base weight.
GPT-2's `Conv1D` and embeddings (in: ids) keep their weights transposed; A and B here have the linear map's orientation.
Of a convolution A is (rank, in/groups, *kernel), and ΔW = scaling · B @ A has the weight's shape (out, in/groups, *kernel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.output_slice import OutputSlice
from lorabank.formats.token_rows import TokenRows

BASE_STORAGE = "base_storage"
"""Key of the metadata that says how the base was stored in training (`fp8`, `nf4`), where that was in fewer than 16 bits."""


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's low-rank change: ΔW = scaling · B @ A."""

    A: Tensor
    """(rank, in), or (rank, in/groups, *kernel) of a convolution."""
    B: Tensor
    """(out, rank)"""
    scaling: float
    """α/r, or α/√r with rsLoRA."""
    groups: int = 1
    """Of a convolution: parts of the channels, whose A is the same."""
    dense: bool = False
    """Of a convolution in groups: whether A sees all channels, (rank, in, *kernel), as PEFT trains it (formats/dense.py)."""
    looks_up: bool = False
    """Whether the layer is an embedding."""
    stack: int = 0
    """Of an expert in a stack of expert weights, whose path ends with its number: how many there are. 0 for other layers."""
    outputs: OutputSlice | None = None
    """Of a slice of a fused layer, whose path ends with the slice's name: which of the layer's outputs are B's rows."""
    attention: bool = False
    """Whether it is an `nn.MultiheadAttention`'s in_proj or out_proj, which PEFT's files name by the module."""
    magnitude: Tensor | None = None
    """(out,) of a decomposed layer (DoRA), whose weight is magnitude · V / ‖V‖ for each output, V = W + scaling · B A."""

    lora_bias: Tensor | None = None
    """(out,) of lora_B (PEFT's `lora_bias`): outputs change by scaling · (B A x + lora_bias)."""
    frozen_rank: int = 0
    """Of its ranks, how many at the end are where it started, with B's sign turned, and don't train (docs/inits.md)."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by the name of their field."""
        found = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "lora_bias": self.lora_bias}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def size(self) -> tuple[int, int]:
        """(in, out), all of a kernel's numbers counted as in."""
        return self.A[0].numel(), self.B.shape[0]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Scaling · B A in the linear map's orientation, (out, in), or (out, in/groups, *kernel), in A's dtype."""
        return self.scaling * (self.B @ self.A.flatten(1)).view(-1, *self.A.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter as a value: its configuration, its tensors by module path, and the base it belongs to."""

    config: AdapterConfig
    layers: Mapping[str, AdapterLayer]
    """Module path in the base model (`model.layers.0.self_attn.q_proj`) to its change."""
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Path of each module that was trained in full (`modules_to_save`) to its parameters, and buffers as the base has them."""
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base that a file holds beside the adapter, by module path: PEFT saves embeddings that carry one along."""
    base_norms: Mapping[str, Tensor] = field(default_factory=dict)
    """By path of a fused layer whose slices are decomposed: ‖W‖ of each output that none of them has, in order."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Module path to its trained bias as a whole, in place of the base's (`bias="lora_only"` or `"all"`)."""
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    """Module path of an embedding (or an output head) to its rows that were trained, in place of the base's."""
    fingerprint: Fingerprint | None = None
    """Of the base that the adapter was trained on; None when the file didn't say."""
    base_model: str | None = None
    """Name or path of that base, for people and for other tools."""
    task_type: str | None = None
    """PEFT's task type, such as `CAUSAL_LM`; other tools choose the model class by it."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What else a file said, kept so that it isn't dropped."""

    def __post_init__(self) -> None:
        for path, layer in self.layers.items():
            if not 2 <= layer.A.ndim <= 5 or layer.B.ndim != 2 or not 0 < len(layer.A) == layer.B.shape[1]:
                raise AdapterFileError(
                    f"layer {path!r}: expected A (rank, in …) and B (out, rank) of one rank of at least 1, "
                    f"got A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)}"
                )
            if layer.outputs is not None and layer.outputs.count != len(layer.B):
                raise AdapterFileError(
                    f"layer {path!r}: B has {len(layer.B)} rows, and the slice {layer.outputs.count} of the layer's outputs"
                )
            if layer.frozen_rank and (2 * layer.frozen_rank != layer.rank or layer.magnitude is not None):
                raise AdapterFileError(
                    f"layer {path!r}: expected a frozen rank of 0, or half of the rank {layer.rank} without DoRA's magnitudes, "
                    f"got {layer.frozen_rank}"
                )
            if layer.magnitude is not None and layer.magnitude.shape != layer.B.shape[:1]:
                raise AdapterFileError(
                    f"layer {path!r}: expected a magnitude for each of {len(layer.B)} outputs, got {tuple(layer.magnitude.shape)}"
                )
            if layer.lora_bias is not None and layer.lora_bias.shape != layer.B.shape[:1]:
                raise AdapterFileError(
                    f"layer {path!r}: expected a lora_bias for each of {len(layer.B)} outputs, got {tuple(layer.lora_bias.shape)}"
                )
        for path, own in self.token_rows.items():
            fit = own.rows.ndim == 2 and len(own.rows) == len(own.ids) == len(set(own.ids))
            if not fit or min(own.ids, default=-1) < 0:
                raise AdapterFileError(
                    f"token rows of {path!r}: expected one row (n, features) for each of {len(own.ids)} different ids ≥ 0, "
                    f"got {tuple(own.rows.shape)}"
                )

    @property
    def adapted(self) -> set[str]:
        """Paths of the layers that have A and B; of slices that of the fused layer, whose bias is one for all of them."""
        return {path if layer.outputs is None else path.rpartition(".")[0] for path, layer in self.layers.items()}

    @property
    def num_parameters(self) -> int:
        """Trained numbers in all layers, of biases and rows, and in modules that were trained in full."""
        saved = (value for module in self.modules.values() for value in module.values() if value.is_floating_point())
        layers = (tensor for layer in self.layers.values() for tensor in layer.tensors.values())
        every = sum(tensor.numel() for tensor in (*layers, *self.extras.values(), *saved))
        return every - sum(layer.frozen_rank * sum(layer.size) for layer in self.layers.values())

    @property
    def extras(self) -> dict[str, Tensor]:
        """Trained biases and token rows, by a name for people."""
        rows = {f"{path} (token rows)": own.rows for path, own in self.token_rows.items()}
        return {**{f"{path}.bias": bias for path, bias in self.biases.items()}, **rows}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """The same adapter with its tensors on another device or in another dtype."""
        moved = {
            path: replace(layer, **{name: tensor.to(device=device, dtype=dtype) for name, tensor in layer.tensors.items()})
            for path, layer in self.layers.items()
        }
        modules = {
            path: {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in module.items()}
            for path, module in self.modules.items()
        }
        norms = {path: norm.to(device=device, dtype=dtype) for path, norm in self.base_norms.items()}
        biases = {path: bias.to(device=device, dtype=dtype) for path, bias in self.biases.items()}
        rows = {path: replace(own, rows=own.rows.to(device=device, dtype=dtype)) for path, own in self.token_rows.items()}
        return replace(self, layers=moved, modules=modules, base_norms=norms, biases=biases, token_rows=rows)

    def save(self, folder: str | Path) -> Path:
        """Write PEFT's file format (`adapter_config.json`, `adapter_model.safetensors`) into `folder`; returns it."""
        from lorabank.formats.peft import save_peft

        return save_peft(self, Path(folder))

    @classmethod
    def load(cls, source: str | Path) -> Adapter:
        """Read an adapter folder or file; its form is told by its content. Raises AdapterFileError.

        Of a folder that holds several it is the one in the folder itself, or `folder:name`.
        """
        from lorabank.formats.detect import load_adapter

        return load_adapter(Path(source))

    @classmethod
    def load_all(cls, folder: str | Path) -> dict[str, Adapter]:
        """Every adapter in a folder by name, as PEFT writes them: `default` in the folder itself, others in subfolders.

        Raises AdapterFileError where there is none, or one can't be read.
        """
        from lorabank.formats.detect import load_adapters

        return load_adapters(folder)


def no_adapter(value: object, call: str) -> str:
    """What to say of a value that isn't an adapter."""
    return (
        f"{call}: expected a lorabank.Adapter, got {value!r:.80}. lorabank.Adapter.load(path) reads one from a folder or a file, "
        "bank.adapter(name) takes one from a bank."
    )
