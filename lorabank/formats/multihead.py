"""Adapters of `nn.MultiheadAttention`'s projections: two layers here, one adapted module in PEFT's files.

PEFT adapts in_proj and out_proj together, with one rank and one scaling: it has in_proj's A and B under the module's own path and
out_proj's under `<module>.base_layer.out_proj`. Of other ranks the smaller is filled up with zeros, a projection without an
adapter has zeros alone, and another scaling goes into B; zeros that could not learn are left out again in reading.
PEFT up to 0.21 adds out_proj's change twice wherever it computes (huggingface/peft, pull request 3774). So that the same file
computes the same, its B is half as large there as here. A file that says that a later version wrote it is taken as it is.
Shapes: E features of the module, R ranks: in_proj's A (R, E) and B (3E, R), out_proj's A (R, E) and B (E, R).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.peft_config import PeftSettings
from lorabank.formats.peft_keys import bare_path, pair_tensors, tensor_name

IN, OUT = "in_proj", "out_proj"
TWICE_UP_TO = (0, 21)
"""The newest version of PEFT that was seen to add out_proj's change twice."""
_WITHIN = f".base_layer.{OUT}"
_OUT = re.compile(rf"(?P<path>.+)\.base_layer\.{OUT}(?P<end>\.lora_[AB](\.[^.]+)?\.weight)")
_IN = re.compile(r"(?P<path>.+?)(?P<end>\.lora_[AB](\.[^.]+)?\.weight)")


def as_peft_has_them(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The layers with those of attention modules under PEFT's paths, both of each module, of one rank and one scaling."""
    found = {path: layer for path, layer in layers.items() if not layer.attention}
    owners = dict.fromkeys(path.rpartition(".")[0] for path, layer in layers.items() if layer.attention)
    for owner in owners:
        first, second = layers.get(f"{owner}.{IN}"), layers.get(f"{owner}.{OUT}")
        found[owner], inner = _alike(first or _zeros(second, 3), second or _zeros(first, 1))
        found[f"{owner}{_WITHIN}"] = replace(inner, B=inner.B / 2)
    return found


def one_of_each(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """`as_peft_has_them`, as PEFT's settings name them: by the modules alone."""
    return {path: layer for path, layer in layers.items() if not path.endswith(_WITHIN)}


def split_attention(
    where: str, settings: PeftSettings, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, AdapterLayer], dict[str, Tensor]]:
    """(the layers of attention modules, the other tensors). Raises AdapterFileError for what doesn't fit each other."""
    owners = {bare_path(match["path"]) for name in tensors if (match := _OUT.fullmatch(name))}
    renamed, left = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in tensors.items():
        outer, inner = _OUT.fullmatch(name), _IN.fullmatch(name)
        if outer is not None:
            _put(where, renamed, f"{bare_path(outer['path'])}.{OUT}{outer['end']}", name, value)
        elif inner is not None and bare_path(inner["path"]) in owners:
            _put(where, renamed, f"{bare_path(inner['path'])}.{IN}{inner['end']}", name, value)
        else:
            left[name] = value
    if not owners:
        return {}, left
    layers: dict[str, AdapterLayer] = {}
    for path, (A, B, looks_up) in pair_tensors(where, renamed).items():
        owner, _, name = path.rpartition(".")
        if f"{owner}.{IN}{_any_end(renamed, owner)}" not in renamed:
            raise AdapterFileError(
                f"{where}: {owner!r} has {OUT}'s matrices and no {tensor_name(owner, 'A')!r}: it is incomplete. Fetch it again."
            )
        rank = settings.layer_rank(owner)
        outputs = A.shape[1] * (3 if name == IN else 1)
        if looks_up or A.ndim != 2 or A.shape[0] != rank or B.shape[0] != outputs:
            raise AdapterFileError(
                f"{where}: the {name} of attention {owner!r} is A {tuple(A.shape)} and B {tuple(B.shape)}; expected "
                f"{(rank, A.shape[1])} and {(outputs, rank)} with the rank that the configuration says. The two files don't "
                "belong together; fetch both again."
            )
        twice = name == OUT and _adds_twice(settings)
        layers[path] = AdapterLayer(A, B * 2 if twice else B, settings.layer_scaling(owner), attention=True)
    return _without_room(layers), left


def _put(where: str, renamed: dict[str, Tensor], key: str, name: str, value: Tensor) -> None:
    if key in renamed:
        raise AdapterFileError(f"{where}: {name!r} stands there a second time: two adapters in a file. Fetch or save it again.")
    renamed[key] = value


def _adds_twice(settings: PeftSettings) -> bool:
    found = re.match(r"(\d+)\.(\d+)", str(settings.raw.get("peft_version") or "0.0"))
    return found is None or (int(found[1]), int(found[2])) <= TWICE_UP_TO


def _alike(first: AdapterLayer, second: AdapterLayer) -> tuple[AdapterLayer, AdapterLayer]:
    """Both with the larger rank, and with a scaling of 1 where they have different ones."""
    rank = max(first.rank, second.rank)
    if first.scaling != second.scaling:
        first, second = (replace(layer, B=layer.B * layer.scaling, scaling=1.0) for layer in (first, second))
    first, second = (
        replace(layer, A=pad(layer.A, (0, 0, 0, rank - layer.rank)), B=pad(layer.B, (0, rank - layer.rank)))
        for layer in (first, second)
    )
    return first, second


def _zeros(other: AdapterLayer | None, times: int) -> AdapterLayer:
    """A projection that changes nothing, beside the other one; `times`: its outputs, in features of the module."""
    assert other is not None  # a module has one at least
    width = other.size[0]
    return replace(other, A=other.A.new_zeros(other.rank, width), B=other.B.new_zeros(times * width, other.rank))


def _without_room(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The layers without last ranks whose A and B are both zero, which no gradient reaches, and those that have no other.

    One of each module keeps all: its rank is the file's, which saving again must give.
    """
    ranks = {path: _used_ranks(layer) for path, layer in layers.items()}
    found: dict[str, AdapterLayer] = {}
    for path, layer in layers.items():
        owner = path.rpartition(".")[0]
        rank = ranks[path] if any(ranks.get(f"{owner}.{name}") == layer.rank for name in (IN, OUT)) else layer.rank
        if rank == layer.rank:
            found[path] = layer
        elif rank:
            found[path] = replace(layer, A=layer.A[:rank].clone(), B=layer.B[:, :rank].clone())
    return found


def _used_ranks(layer: AdapterLayer) -> int:
    used = (layer.A.ne(0).any(1) | layer.B.ne(0).any(0)).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def _any_end(tensors: Mapping[str, Tensor], owner: str) -> str:
    """How names of this module's matrices end, with an adapter's name in them or not."""
    start = f"{owner}.{OUT}"
    return next(name.removeprefix(start) for name in tensors if name.startswith(f"{start}.lora_"))
