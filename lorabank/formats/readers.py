"""Who reads an adapter, and what each of them would refuse: one table, which `inspect` prints and `export` goes by.

What other tools do was read in their sources: vLLM 0.32 (`lora/peft_helper.py`, `lora/utils.py`, `config/lora.py`), llama.cpp as
llama-cpp-python 0.3.36 carries it (`src/llama-adapter.cpp`), and PEFT's wheels from 0.6.2 to 0.17.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorabank.errors import AdapterFileError
from lorabank.formats import dense
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import split
from lorabank.formats.extras import extras_by_path
from lorabank.formats.peft_config import stored_transposed
from lorabank.formats.peft_keys import file_rank
from lorabank.formats.slices import without_slices

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""
VLLM_EMBEDDING = "embed_tokens"
"""The name of the one embedding that vLLM adapts."""
VLLM_HEADS = ("score", "classifier")
"""Paths of a classifier's head: the one module that vLLM reads as it was trained in full, from 0.31 on."""
NO_MODULES = "vLLM reads no modules that were trained in full (modules_to_save)"
EXPORTED = "lorabank export --to vllm writes them so"
UNMERGED = "serve it beside the base (bank.load)"
MERGE = "merge it (lorabank merge) and serve the merged model"


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """One reason why a reader refuses an adapter, or reads it otherwise than it was meant."""

    what: str
    """What is in the way, as a part of a sentence."""
    way_out: str
    layers: tuple[str, ...] = ()
    """Paths of the layers that it is about; empty: the whole adapter."""

    def __str__(self) -> str:
        shown = ", ".join(self.layers[:2]) + (f" and {len(self.layers) - 2} more" if len(self.layers) > 2 else "")
        return f"{self.what}{f' ({shown})' if shown else ''}: {self.way_out}"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A tool that reads adapters."""

    title: str
    obstacles: Callable[[Adapter], list[Obstacle]]
    """What stands in its way; empty where it reads the adapter right."""


def obstacles(adapter: Adapter, reader: str) -> list[Obstacle]:
    """What `reader` (a key of `READERS`) would refuse."""
    return READERS[reader].obstacles(adapter)


def refuse(adapter: Adapter, reader: str, *, where: str = "the adapter", also: Sequence[Obstacle] = ()) -> None:
    """Raise AdapterFileError with every reason why `reader` can't read the adapter, `also` among them; nothing where it can."""
    found = [*obstacles(adapter, reader), *also]
    if found:
        raise AdapterFileError(f"{where} can't be read by {READERS[reader].title}: {'; '.join(map(str, found))}.")


def _paths(adapter: Adapter, wanted: Callable[[str, AdapterLayer], bool]) -> tuple[str, ...]:
    return tuple(path for path, layer in adapter.layers.items() if wanted(path, layer))


def _found(what: str, way_out: str, layers: tuple[str, ...]) -> list[Obstacle]:
    return [Obstacle(what=what, way_out=way_out, layers=layers)] if layers else []


def non_finite(adapter: Adapter) -> tuple[str, ...]:
    """Paths of the layers, names of biases and rows, and paths of modules trained in full, that hold NaN or infinity."""
    layers = _paths(adapter, lambda path, layer: not all(bool(value.isfinite().all()) for value in layer.tensors.values()))
    extras = (name for name, value in adapter.extras.items() if not value.isfinite().all())
    modules = (path for path, module in adapter.modules.items() if not all(bool(v.isfinite().all()) for v in module.values()))
    return (*layers, *extras, *modules)


def _broken(adapter: Adapter) -> list[Obstacle]:
    return _found("NaN or infinity", "use an earlier checkpoint", non_finite(adapter))


def _dora(adapter: Adapter, reader: str, way_out: str = MERGE) -> list[Obstacle]:
    layers = _paths(adapter, lambda path, layer: layer.magnitude is not None)
    return _found(f"{reader} doesn't read DoRA", way_out, layers)


def _extras(adapter: Adapter, reader: str) -> list[Obstacle]:
    return _found(f"{reader} reads no trained biases or token rows", MERGE, tuple(extras_by_path(adapter)))


def _convolutions(adapter: Adapter, reader: str) -> list[Obstacle]:
    return _found(f"{reader} adapts no convolutions", MERGE, _paths(adapter, lambda path, layer: layer.A.ndim > 2))


def _modules(adapter: Adapter, reader: str, way_out: str = MERGE) -> list[Obstacle]:
    return _found(f"{reader} reads no modules that were trained in full (modules_to_save)", way_out, tuple(adapter.modules))


def _experts(adapter: Adapter, reader: str, *, stacked: bool = False) -> list[Obstacle]:
    """`stacked`: those of a stack are read."""
    layers = _paths(adapter, lambda path, layer: ".experts." in f".{path}." and not (stacked and layer.stack))
    return _found(f"experts aren't exported for {reader}", MERGE, layers)


def _attention(adapter: Adapter, reader: str) -> list[Obstacle]:
    layers = _paths(adapter, lambda path, layer: layer.attention)
    return _found(f"nn.MultiheadAttention isn't adapted by {reader}", MERGE, layers)


IMAGE_PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
"""Components of an image model's pipeline by which its paths are told; `transformer` begins GPT-2's paths as well."""
CHECKED_TASKS = ("text-generation", "text-classification")
"""Tasks whose adapters were held to other servers; an adapter that names none counts as the first."""
IMAGE_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")
"""Parts of a U-Net or a diffusion transformer, whose adapter may have paths without a component."""


def _image_models(adapter: Adapter, reader: str) -> list[Obstacle]:
    way_out = "convert it (lorabank convert --to diffusers) and load it there"
    return _found(f"{reader} has no image models", way_out, _paths(adapter, lambda path, layer: of_image_model(path)))


def _tasks(adapter: Adapter, reader: str) -> list[Obstacle]:
    task = adapter.metadata.get("task", CHECKED_TASKS[0])
    if task in CHECKED_TASKS:
        return []
    return [Obstacle(what=f"no adapter for {task} was ever checked in {reader}", way_out=UNMERGED)]


def of_image_model(path: str) -> bool:
    """Whether a layer's path is one of an image model's: its U-Net, diffusion transformer or text encoders."""
    component, inside = split(path)
    return component in IMAGE_PARTS or inside.partition(".")[0] in IMAGE_BLOCKS


def _as_in_a_file(adapter: Adapter) -> Adapter:
    """With slices of a fused layer as one, whose rank is the sum of theirs; only sizes and names are looked at."""
    return without_slices(adapter, lambda path, outputs: torch.ones(outputs))


def _vllm(adapter: Adapter) -> list[Obstacle]:
    """Of a folder as it is."""
    adapter = _as_in_a_file(adapter)
    ranks = {path: file_rank(layer) for path, layer in adapter.layers.items()}
    too_high = tuple(path for path, rank in ranks.items() if rank > VLLM_RANKS[-1])
    return [*_vllm_kinds(adapter), *_found(rank_obstacle(max(ranks.values(), default=0)), MERGE, too_high)]


def rank_obstacle(rank: int) -> str:
    """The words for a rank that vLLM doesn't take."""
    return f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}"


def unread_modules(paths: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules trained in full that vLLM doesn't read: it takes one head, under the path that it has there."""
    found = tuple(paths)
    return () if len(found) == 1 and found[0] in VLLM_HEADS else found


def _vllm_kinds(adapter: Adapter) -> list[Obstacle]:
    names = _paths(adapter, lambda path, layer: layer.looks_up and path.rpartition(".")[2] != VLLM_EMBEDDING)
    transposed = tuple(adapter.layers)[:1] if stored_transposed(adapter) else ()
    return [
        *_broken(adapter),
        *_image_models(adapter, "vLLM"),
        *_tasks(adapter, "vLLM"),
        *_dora(adapter, "vLLM"),
        *_extras(adapter, "vLLM"),
        *_convolutions(adapter, "vLLM"),
        *_found(f"vLLM adapts no embedding but {VLLM_EMBEDDING!r}", MERGE, names),
        *_found("vLLM reads experts one by one", EXPORTED, _paths(adapter, lambda path, layer: layer.stack > 0)),
        *_found(NO_MODULES, MERGE, unread_modules(adapter.modules)),
        *_attention(adapter, "vLLM"),
        *_found("vLLM takes no adapters for GPT-2", MERGE, transposed),
    ]


def _older_vllm(adapter: Adapter) -> list[Obstacle]:
    adapter = _as_in_a_file(adapter)
    ranks = {file_rank(layer) for layer in adapter.layers.values()}
    scalings = {round(layer.scaling, 9) for layer in adapter.layers.values()}
    mixed = Obstacle(
        what="rank or scaling differ between layers, and it takes one for all",
        way_out="lorabank export --to vllm folds and pads them",
    )
    heads = tuple(path for path in adapter.modules if path not in unread_modules(adapter.modules))
    head = _found("vLLM reads a head that was trained in full from 0.31 on", f"update vLLM, or {MERGE}", heads)
    return [*_vllm(adapter), *head, *([mixed] if len(ranks) > 1 or len(scalings) > 1 else [])]


def _llama_cpp(adapter: Adapter) -> list[Obstacle]:
    merged = "lorabank export --to gguf --merged writes it into a base GGUF"
    return [
        *_broken(adapter),
        *_image_models(adapter, "llama.cpp"),
        *_tasks(adapter, "llama.cpp"),
        *_dora(adapter, "llama.cpp", merged),
        *_extras(adapter, "llama.cpp"),
        *_convolutions(adapter, "llama.cpp"),
        *_experts(adapter, "llama.cpp", stacked=True),
        *_modules(adapter, "llama.cpp", "merge it (lorabank merge) and convert the merged model"),
        *_attention(adapter, "llama.cpp"),
    ]


def _merged_gguf(adapter: Adapter) -> list[Obstacle]:
    return [
        *_broken(adapter),
        *_image_models(adapter, "llama.cpp"),
        *_convolutions(adapter, "a GGUF language model"),
        *_extras(adapter, "a merge into a GGUF"),
        *_experts(adapter, "a GGUF", stacked=True),
        *_modules(adapter, "a merge into a GGUF", "merge it (lorabank merge) and convert the merged model"),
        *_attention(adapter, "a GGUF"),
    ]


def _older_peft(adapter: Adapter) -> list[Obstacle]:
    layers = adapter.layers
    three, one = (tuple(path for path, layer in layers.items() if layer.A.ndim == ndim) for ndim in (5, 3))
    convolved = _paths(adapter, lambda path, layer: layer.magnitude is not None and layer.A.ndim > 2)
    stacked = _paths(adapter, lambda path, layer: layer.stack > 0)
    attention = _paths(adapter, lambda path, layer: layer.attention)
    dora = _paths(adapter, lambda path, layer: layer.magnitude is not None and layer.A.ndim == 2 and not layer.looks_up)
    looked_up = _paths(adapter, lambda path, layer: layer.magnitude is not None and layer.looks_up)
    low = _paths(adapter, lambda path, layer: layer.lora_bias is not None)
    return [
        *_broken(adapter),
        *_found("PEFT reads rsLoRA from 0.8 on", "update PEFT", tuple(layers)[:1] if adapter.config.use_rslora else ()),
        *_found("PEFT reads DoRA from 0.9 on", "update PEFT", dora),
        *_found("PEFT reads DoRA on convolutions from 0.10 on", "update PEFT", convolved),
        *_found("PEFT reads DoRA on embeddings from 0.13 on", "update PEFT", looked_up),
        *_found("PEFT reads adapters of stacked experts from 0.17 on", "update PEFT", stacked),
        *_found("PEFT reads lora_bias from 0.14 on", "update PEFT", low),
        *_found("PEFT reads token rows from 0.15 on", "update PEFT", tuple(adapter.token_rows)),
        *_found("PEFT reads adapters of nn.MultiheadAttention from 0.15 on", "update PEFT", attention),
        *_found("PEFT reads adapters of Conv3d from 0.14 on", "update PEFT", three),
        *_found("PEFT reads adapters of Conv1d from 0.15 on", "update PEFT", one),
    ]


def _merge(adapter: Adapter) -> list[Obstacle]:
    return [*_broken(adapter), *_found(f"a convolution in groups, and {dense.WHY}", UNMERGED, dense.dense_layers(adapter))]


def _exact(adapter: Adapter) -> list[Obstacle]:
    way_out = "merge it into the base first, or route rows to a mixture"
    layers = _paths(adapter, lambda path, layer: layer.magnitude is not None)
    return [*_broken(adapter), *_found("what DoRA does to a weight isn't one of several sums", way_out, layers)]


READERS: Mapping[str, Reader] = {
    "vllm": Reader(title="vLLM 0.32", obstacles=_vllm),
    "older vllm": Reader(title="older vLLM", obstacles=_older_vllm),
    "gguf": Reader(title="llama.cpp, as an adapter", obstacles=_llama_cpp),
    "merged gguf": Reader(title="llama.cpp, merged", obstacles=_merged_gguf),
    "older peft": Reader(title="older PEFT", obstacles=_older_peft),
    "merge": Reader(title="merge", obstacles=_merge),
    "combine": Reader(title="combine, exact", obstacles=_exact),
}
"""Readers by name, in the order in which they are shown."""
