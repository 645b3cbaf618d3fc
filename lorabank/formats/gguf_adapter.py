"""An adapter as GGUF, llama.cpp's file: two tensors a layer, `<weight>.lora_a` (r, in) and `<weight>.lora_b` (out, r).

llama.cpp adds α/r · B A to a product, with one α for the file and r the tensor's own (`llama_adapter_lora_weight::get_scale`).
A layer of another scaling gets the difference folded into its B. Where the architecture interleaves the rows of q and k, B's
rows go along.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabank.errors import AdapterFileError, ConfigError, OutputError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.gguf_base import GgufBase, interleaved, require_gguf
from lorabank.formats.gguf_experts import expert_places
from lorabank.formats.readers import refuse
from lorabank.formats.scratch import parents_of
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import without_slices

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Storages of a GGUF's tensors that can be written here, and gguf's names of them."""
ADAPTER_DTYPES = ("f32", "f16")
"""Those that an adapter's matrices may have."""
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"


@dataclass(frozen=True, kw_only=True)
class WrittenGguf:
    """What an adapter file holds."""

    file: Path
    alpha: float
    """The file's one α."""
    tensors: int
    folded: int
    """Layers whose B took up a difference in scaling."""


def places(adapter: Adapter, base: GgufBase, *, where: str = "the adapter") -> dict[str, str]:
    """Module path → name of the weight in the GGUF, for all layers but stacked experts.

    Raises AdapterFileError naming the layer that has no place, or another shape than the base's weight.
    """
    found: dict[str, str] = {}
    for path, layer in adapter.layers.items():
        if layer.stack:  # gguf_experts.py
            continue
        name = base.tensor_name(path)
        if name is None or (base.shapes and name not in base.shapes):
            tied = " (its output head is its embedding)" if name == HEAD and base.tied else ""
            raise AdapterFileError(
                f"{where}: layer {path!r} has no place in base {base.name!r} as llama.cpp has it ({base.architecture}, "
                f"{base.blocks} blocks){tied}. Is it the adapter's base? Otherwise merge it (lorabank merge)."
            )
        if name == EMBEDDING and base.tied:
            raise AdapterFileError(
                f"{where}: layer {path!r} is an embedding that base {base.name!r} also uses as its output head, so a change of "
                "one would change both in llama.cpp. Train without the embedding, or merge into a base with a head of its own."
            )
        fan_in, fan_out = layer.size
        shape = (fan_in, fan_out) if layer.looks_up else (fan_out, fan_in)
        if base.shapes and base.shapes[name] != shape:
            raise AdapterFileError(
                f"{where}: layer {path!r} changes a weight of {shape}, and {name} of base {base.name!r} is {base.shapes[name]}: "
                "it was trained on another model. Name its own base with --base."
            )
        found[path] = name
    return found


def write_adapter_gguf(
    adapter: Adapter, base: GgufBase, file: str | Path, *, dtype: str = "f32", where: str = "the adapter"
) -> WrittenGguf:
    """Write `adapter` as a GGUF adapter of `base` to `file`, whole or not at all.

    dtype: storage of A and B, `f32` or `f16`. `where` names the adapter in messages. Raises AdapterFileError for what llama.cpp
    can't read or `base` doesn't have, OutputError, MissingExtraError without the `gguf` library.
    """
    require_gguf()
    import gguf

    check_dtype(dtype, ADAPTER_DTYPES, what="an adapter's")
    adapter = without_slices(adapter, any_norms)
    refuse(adapter, "gguf", where=where)
    names = places(adapter, base, where=where)
    alpha = common_alpha(adapter)
    stacked = expert_places(adapter, base, where=where)
    pairs = {name: as_llama_cpp_has_it(adapter.layers[path], name, base, alpha) for path, name in names.items()}
    for name, part in stacked.items():
        both = [as_llama_cpp_has_it(layer, name, base, alpha) for layer in part.experts]
        pairs[name] = torch.stack([A for A, _ in both]), torch.stack([B for _, B in both])
    largest = max(float(value.abs().max()) for pair in pairs.values() for value in pair)
    if dtype == "f16" and largest > torch.finfo(torch.float16).max:
        raise AdapterFileError(f"{where}: holds numbers up to {largest:.3g}, which f16 can't. Write it with --dtype f32.")

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, base.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (A, B) in sorted(pairs.items()):
            add(writer, f"{name}.lora_a", A.numpy(), dtype)
            add(writer, f"{name}.lora_b", B.numpy(), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(Path(file), write)
    plain = [layer for layer in adapter.layers.values() if not layer.stack]
    folded = sum(_folds(layer, alpha) for layer in (*plain, *(part.experts[0] for part in stacked.values())))
    return WrittenGguf(file=Path(file), alpha=alpha, tensors=2 * len(pairs), folded=folded)


def common_alpha(adapter: Adapter) -> float:
    """The α that most layers have, counted as scaling · rank, so that as few as can be are folded. Never 0: that means none."""
    counts = Counter(_alpha(layer) for layer in adapter.layers.values() if _alpha(layer) != 0)
    return max(counts, key=lambda alpha: (counts[alpha], -alpha)) if counts else 1.0


def _alpha(layer: AdapterLayer) -> float:
    return float(np.float32(layer.scaling * layer.rank))  # as the file keeps it


def _folds(layer: AdapterLayer, alpha: float) -> bool:
    return _alpha(layer) != alpha


def as_llama_cpp_has_it(layer: AdapterLayer, name: str, base: GgufBase, alpha: float) -> tuple[Tensor, Tensor]:
    """(lora_a, lora_b), float32 on the CPU: B with what `alpha` leaves of the scaling, and q's and k's rows in llama.cpp's order.

    Of the embedding lora_a is (ids, r), which llama.cpp looks rows up in.
    """
    A, B = (value.detach().to("cpu", torch.float32) for value in (layer.A, layer.B))
    if _folds(layer, alpha):
        B = B * (layer.scaling * layer.rank / alpha)
    heads = base.heads_of(name)
    if heads is not None:
        B = interleaved(B, heads)
    return (A.t().contiguous() if layer.looks_up else A.contiguous()), B.contiguous()


def check_dtype(dtype: str, known: tuple[str, ...], *, what: str) -> None:
    """Raise ConfigError unless `dtype` is one of `known`."""
    if dtype not in known:
        raise ConfigError(f"{what} GGUF storage: expected one of {', '.join(known)}, got {dtype!r}{closest(dtype, known)}")


def add(writer: Any, name: str, values: np.ndarray, dtype: str) -> None:
    """Add one tensor (float32) to a `gguf.GGUFWriter` in the storage `dtype`."""
    import gguf

    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Write `file` under a temporary name and rename it at the end. Raises OutputError; nothing is left behind then."""
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    with parents_of(file):
        try:
            write(scratch)
            scratch.replace(file)
        except OSError as error:
            raise OutputError(f"{file}: can't be written ({error.strerror or error}). Nothing was replaced.") from error
        finally:
            scratch.unlink(missing_ok=True)
