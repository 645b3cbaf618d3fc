"""An adapter merged into a copy of its base's GGUF file, tensor by tensor: only one weight is unpacked at a time.

Everything else of the file (vocabulary, template, weights that the adapter leaves alone) is copied as it stands. A weight that
changes is written in 16 or 32 bits: in 4 bits rounding would lose most of ΔW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabank.errors import AdapterFileError, ModelError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.gguf_adapter import DTYPES, check_dtype, places, write_whole
from lorabank.formats.gguf_base import GgufBase, interleaved, open_gguf, read_base
from lorabank.formats.gguf_experts import StackPart, expert_places, merged_experts
from lorabank.formats.readers import refuse
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import sliced, without_slices
from lorabank.merging.layer import with_norms

WRITER_SETS = ("general.architecture",)
"""Keys that gguf's writer writes by itself; those that begin with `GGUF.` are the reader's own."""
FILE_TYPE = "general.file_type"


@dataclass(frozen=True, kw_only=True)
class MergedGguf:
    """What a merge into a GGUF file changed."""

    file: Path
    changed: int
    """Weights that the adapter changed."""
    copied: int
    """Tensors that stand as they were."""
    lost_share: float
    """‖lost Δ‖/‖Δ‖: how much of the change rounding to the storage lost."""


def merge_gguf(
    base_file: str | Path,
    adapter: Adapter | None,
    file: str | Path,
    *,
    dtype: str = "f16",
    all_tensors: bool = False,
    where: str = "the adapter",
) -> MergedGguf:
    """Write the base's GGUF with `adapter` in its weights to `file`, whole or not at all; DoRA included.

    dtype: storage of the weights that change (`f32`, `f16`, `bf16`, `q8_0`); with `all_tensors` of every matrix, so that None for
    the adapter unpacks a quantised file. Raises AdapterFileError for what has no place in the base, ModelError for a file that
    can't be read, OutputError, MissingExtraError without the `gguf` library.
    """
    base_file, file = Path(base_file), Path(file)
    base = read_base(base_file)
    import gguf

    check_dtype(dtype, tuple(DTYPES), what="a model's")
    layers: dict[str, AdapterLayer] = {}
    stacked: dict[str, StackPart] = {}
    fused: dict[str, Mapping[str, AdapterLayer]] = {}
    if adapter is not None:
        parts = sliced(adapter.layers)
        adapter = without_slices(adapter, any_norms)  # norms come with the weights
        refuse(adapter, "merged gguf", where=where)
        named = places(adapter, base, where=where)
        layers = {name: adapter.layers[path] for path, name in named.items()}
        fused = {named[path]: own for path, own in parts.items()}
        stacked = expert_places(adapter, base, where=where)
    changed = layers.keys() | stacked.keys()
    reader = open_gguf(base_file, base.name)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    written = [tensor for tensor in reader.tensors if tensor.name in changed or (all_tensors and len(tensor.shape) > 1)]
    _check_widths(written, kind, dtype)
    rewritten = {tensor.name for tensor in written}
    lost = wanted = 0.0

    def write(path: Path) -> None:
        nonlocal lost, wanted
        writer = gguf.GGUFWriter(path, base.architecture)
        _copy_settings(reader, writer, but=(FILE_TYPE,) if all_tensors else ())
        if all_tensors:
            writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{DTYPES[dtype]}"]))
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if tensor.name in rewritten:
                shape = gguf.quant_shape_to_byte_shape(shape, kind)
                size = int(np.prod(shape))
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
            else:
                data = tensor.data
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            if tensor.name not in rewritten:
                writer.write_tensor_data(tensor.data)
                continue
            weight = _unpacked(tensor, base.name)
            if tensor.name in stacked:
                merged = merged_experts(weight, stacked[tensor.name])
            else:
                layer = layers.get(tensor.name)
                if layer is not None and tensor.name in fused:
                    layer = with_norms(tensor.name, layer, fused[tensor.name], weight.double())
                merged = weight if layer is None else merged_weight(weight, layer, tensor.name, base)
            packed = gguf.quants.quantize(merged.float().numpy(), kind)
            if tensor.name in changed:
                stored = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))
                lost += float((stored.double() - merged).square().sum())
                wanted += float((merged - weight.double()).square().sum())
            writer.write_tensor_data(packed.view(np.uint8).reshape(gguf.quant_shape_to_byte_shape(tuple(merged.shape), kind)))
        writer.close()

    write_whole(file, write)
    share = (lost / wanted) ** 0.5 if wanted else 0.0
    return MergedGguf(file=file, changed=len(changed), copied=len(reader.tensors) - len(rewritten), lost_share=share)


def _check_widths(tensors: Sequence[Any], kind: Any, dtype: str) -> None:
    import gguf

    block = gguf.GGML_QUANT_SIZES[kind][0]
    for tensor in tensors:
        width = int(tensor.shape[0])  # GGUF names the innermost dimension first
        if width % block:
            raise AdapterFileError(
                f"{tensor.name} has rows of {width} numbers, and {dtype} takes a multiple of {block}. Nothing was written; use "
                "--dtype f16."
            )


def merged_weight(weight: Tensor, layer: AdapterLayer, name: str, base: GgufBase) -> Tensor:
    """W + ΔW, or magnitude · V / ‖V‖ for DoRA (arXiv:2402.09353, eq. 5), float64, in llama.cpp's order of rows."""
    B, A = layer.B.detach().double(), layer.A.detach().double()
    magnitude = layer.magnitude
    heads = base.heads_of(name)
    if heads is not None:
        B = interleaved(B, heads)
        magnitude = None if magnitude is None else interleaved(magnitude, heads)
    delta = layer.scaling * (B @ A)
    merged = weight.double() + (delta.t() if layer.looks_up else delta)
    if magnitude is not None:
        turned = merged.t() if layer.looks_up else merged  # a view: its rows are the outputs
        turned *= (magnitude.double() / turned.norm(dim=1))[:, None]
    return merged


def _unpacked(tensor: Any, name: str) -> Tensor:
    import gguf

    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(
            f"base {name!r}: {tensor.name} is stored as {tensor.tensor_type.name}, which can't be unpacked here. "
            "Use the base's F16, BF16 or Q8_0 file."
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _copy_settings(reader: Any, writer: Any, *, but: tuple[str, ...]) -> None:
    import gguf

    for field in reader.fields.values():
        if field.name in (*WRITER_SETS, *but) or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        if field.name == "general.alignment":
            writer.data_alignment = int(field.contents())
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
