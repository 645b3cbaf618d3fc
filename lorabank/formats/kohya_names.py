"""kohya's names of layers, read without a model: a written table of the modules that its networks adapt.

A name is a path with `_` for `.`, so it can't be split at its underscores; but the modules are few, and no two of them give
one name. SDXL's U-Net goes by its original names (`input_blocks.4.1…`), Flux by its own, where q, k and v are one matrix.
Index arithmetic of U-Nets: two layers a block, as in SD 1.x, 2.x and SDXL (Rombach et al., arXiv:2112.10752; Podell et al.,
arXiv:2307.01952).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from lorabank.formats.components import in_file_names, in_model_names, split

PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lora_transformer_", "lycoris_")
"""What names begin with."""
FUSED = {3: "q, k and v", 4: "q, k, v and the MLP"}
_BLOCKS = 4
"""Blocks of the largest of these U-Nets on each way."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer of a file stands in a model."""

    paths: tuple[str, ...]
    """Module paths with their component; several where the layer is their weights, one below the other."""
    swapped: bool = False
    """Whether the two halves of the outputs change places."""
    style: str = ""
    """Which spelling it is: `sgm` (the original names), `flux`, `diffusers`, `text` or `model`."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a file spells what may be spelled in two ways."""

    unet: str = "diffusers"
    """`sgm`, as SDXL's files do, or `diffusers`, as those of SD 1.x and 2.x do."""
    text: str = "te"
    """Name of the first text encoder: `te`, or `te1` beside a second one."""

    def __str__(self) -> str:
        return f"{self.unet} {self.text}"

    @classmethod
    def read(cls, text: str) -> Naming | None:
        """`str(naming)` back; None for anything else."""
        unet, _, encoder = text.partition(" ")
        return cls(unet=unet, text=encoder) if unet in ("sgm", "diffusers") and encoder in ("te", "te1") else None

    @classmethod
    def of(cls, paths: Collection[str]) -> Naming:
        """The one that kohya's own files have for a model with these layers."""
        deep = any(re.match(r"unet\..*transformer_blocks\.[1-9]", path) for path in paths)
        sdxl = deep or any(path.startswith(("text_encoder_2.text", "unet.add_embedding")) for path in paths)
        flux = any(path.startswith("transformer.") for path in paths)
        return cls(unet="sgm" if sdxl else "diffusers", text="te1" if sdxl or flux else "te")


def place(name: str) -> Place | None:
    """Where the layer of this name stands, or None where the table doesn't have it."""
    for prefix, style, pattern, paths, swapped in _rules():
        if name.startswith(prefix) and (match := pattern.fullmatch(name)):
            return Place(
                paths=tuple(in_model_names(path.format(*match.groups())) for path in paths), swapped=swapped, style=style
            )
    return None


def name_of(path: str, naming: Naming) -> tuple[str, Place] | None:
    """kohya's name of the layer that a module path is, or is a part of, and all of that layer; None where it has none."""
    component, _ = split(path)
    written = in_file_names(path)
    for template, (prefix, style, original, paths, swapped) in _by_path().get(component, ()):
        if style not in (naming.unet, "flux", "text") or not (match := template.fullmatch(written)):
            continue
        if prefix in ("lora_te_", "lora_te1_") and prefix != f"lora_{naming.text}_":
            continue
        places = tuple(in_model_names(found.format(*match.groups())) for found in paths)
        return prefix + original.format(*match.groups()).replace(".", "_"), Place(paths=places, swapped=swapped, style=style)
    return None


def kernel_of(path: str) -> tuple[int, ...] | None:
    """Kernel of a U-Net's convolution by its name; () for a linear layer, None where SD 1.x has the one and SDXL the other."""
    leaf = path.rpartition(".")[2]
    if leaf in ("proj_in", "proj_out") and path.startswith("unet."):
        return None
    if path.startswith("unet.") and leaf in ("conv1", "conv2", "conv", "conv_in", "conv_out"):
        return 3, 3
    return (1, 1) if path.startswith("unet.") and leaf == "conv_shortcut" else ()


_Entry = tuple[str, str, str, tuple[str, ...], bool]
"""(prefix, style, kohya's path, the module paths, swapped), with {} for an index."""

_TRANSFORMER = "transformer_blocks.{}."
_ATTENTION = [f"{attn}.{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
_SPATIAL = ["proj_in", "proj_out", *(_TRANSFORMER + leaf for leaf in (*_ATTENTION, "ff.net.0.proj", "ff.net.2"))]
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_CLIP = [
    *(f"text_model.encoder.layers.{{}}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "text_model.encoder.layers.{}.mlp.fc1",
    "text_model.encoder.layers.{}.mlp.fc2",
]
_T5 = [
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{leaf}" for leaf in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo")),
]
_STREAM = {
    "attn.proj": ("attn.to_out.0", "attn.to_add_out"),
    "mlp.0": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp.2": ("ff.net.2", "ff_context.net.2"),
    "mod.lin": ("norm1.linear", "norm1_context.linear"),
}
"""A double block's layer to diffusers' names of it for the image and for the text."""
_FLUX_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{ours}.{side}": f"time_text_embed.{theirs}.linear_{number}"
        for ours, theirs in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for number, side in ((1, "in_layer"), (2, "out_layer"))
    },
    "final_layer.linear": "proj_out",
}


def _unet() -> Iterator[tuple[str, str]]:
    """(original path, diffusers' path) of every module of a U-Net that is adapted."""
    yield from _OUTER.items()
    for block in range(_BLOCKS):
        for layer in range(2):
            yield from _unet_layer(f"input_blocks.{3 * block + layer + 1}", f"down_blocks.{block}", layer)
        for layer in range(3):
            yield from _unet_layer(f"output_blocks.{3 * block + layer}", f"up_blocks.{block}", layer)
        yield f"input_blocks.{3 * block + 3}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
        # after the attention; a block without has it at 1, which is read too
        yield f"output_blocks.{3 * block + 2}.2.conv", f"up_blocks.{block}.upsamplers.0.conv"
        yield f"output_blocks.{3 * block + 2}.1.conv", f"up_blocks.{block}.upsamplers.0.conv"
    for number, theirs in ((0, "resnets.0"), (2, "resnets.1")):
        yield from ((f"middle_block.{number}.{a}", f"mid_block.{theirs}.{b}") for a, b in _RESNET.items())
    yield from ((f"middle_block.1.{leaf}", f"mid_block.attentions.0.{leaf}") for leaf in _SPATIAL)


def _unet_layer(ours: str, theirs: str, layer: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.0.{a}", f"{theirs}.resnets.{layer}.{b}") for a, b in _RESNET.items())
    yield from ((f"{ours}.1.{leaf}", f"{theirs}.attentions.{layer}.{leaf}") for leaf in _SPATIAL)


def _flux() -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(original path, diffusers' paths, whether the outputs' halves are swapped) of Flux's transformer."""
    yield from ((ours, (theirs,), False) for ours, theirs in _FLUX_OUTER.items())
    for side, names in enumerate((("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))):
        stream = f"double_blocks.{{}}.{('img', 'txt')[side]}_"
        yield f"{stream}attn.qkv", tuple(f"transformer_blocks.{{}}.attn.{name}" for name in names), False
        yield from ((stream + ours, (f"transformer_blocks.{{}}.{theirs[side]}",), False) for ours, theirs in _STREAM.items())
    single = "single_transformer_blocks.{}."
    yield "single_blocks.{}.linear1", (*(f"{single}attn.to_{name}" for name in "qkv"), f"{single}proj_mlp"), False
    yield "single_blocks.{}.linear2", (f"{single}proj_out",), False
    yield "single_blocks.{}.modulation.lin", (f"{single}norm.linear",), False
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), True  # diffusers has scale before shift


def _entries() -> Iterator[_Entry]:
    unet = list(_unet())
    for theirs in dict.fromkeys(theirs for _, theirs in unet):
        yield "lora_unet_", "diffusers", theirs, (f"unet.{theirs}",), False
    for ours, theirs in unet:
        yield "lora_unet_", "sgm", ours, (f"unet.{theirs}",), False
    for ours, theirs, swapped in _flux():
        yield "lora_unet_", "flux", ours, tuple(f"transformer.{path}" for path in theirs), swapped
        for path in theirs:  # as OneTrainer writes them
            yield "lora_transformer_", "onetrainer", path, (f"transformer.{path}",), False
    for leaf in _CLIP:
        for prefix, encoder in (("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
            yield prefix, "text", leaf, (f"{encoder}.{leaf}",), False
    yield "lora_te2_", "text", "text_projection", ("text_encoder_2.text_projection",), False
    for leaf in _T5:
        yield "lora_te3_", "text", leaf, (f"text_encoder_2.{leaf}",), False


@cache
def _rules() -> list[tuple[str, str, re.Pattern[str], tuple[str, ...], bool]]:
    return [
        (prefix, style, re.compile(re.escape(prefix + original.replace(".", "_")).replace(r"\{\}", r"(\d+)")), paths, swapped)
        for prefix, style, original, paths, swapped in _entries()
    ]


@cache
def _by_path() -> Mapping[str, list[tuple[re.Pattern[str], _Entry]]]:
    found: dict[str, list[tuple[re.Pattern[str], _Entry]]] = {}
    for entry in _entries():
        for path in entry[3]:
            pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
            found.setdefault(path.partition(".")[0], []).append((pattern, entry))
    return found
