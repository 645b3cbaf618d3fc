"""Adapters of stacked expert weights: an `AdapterLayer` an expert here, one pair of matrices a stack in PEFT's files.

PEFT (`target_parameters`) has A (E · r, in), the experts one behind the other, and B (out, r · E), where a rank's experts are. Of
a module with two such parameters the first is under `<module>.base_layer`, the second under `<module>`.
Shapes: E experts, R ranks, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.peft_config import PeftSettings
from lorabank.formats.peft_keys import bare_path, check_dtype, tensor_name

_PAIR = re.compile(r"(?P<path>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<role>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_OWNER = "experts"
"""Name that modules of stacked experts have."""
_ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""Names of stacked parameters in the order in which modules have them."""


def joined(layers: Sequence[AdapterLayer | None]) -> tuple[Tensor, Tensor, float]:
    """A (E, R, I), B (E, O, R) and the scaling of a stack. Experts without a layer get zeros.

    Of several ranks it is the largest, filled up with zeros; of several scalings 1, with each in its B.
    """
    present = [layer for layer in layers if layer is not None]
    rank, scalings = max(layer.rank for layer in present), {layer.scaling for layer in present}
    dtype = reduce(torch.promote_types, (tensor.dtype for layer in present for tensor in (layer.A, layer.B)))
    A = torch.zeros(len(layers), rank, present[0].A.shape[1], dtype=dtype)
    B = torch.zeros(len(layers), len(present[0].B), rank, dtype=dtype)
    for i, layer in enumerate(layers):
        if layer is not None:
            A[i, : layer.rank] = layer.A
            B[i, :, : layer.rank] = layer.B if len(scalings) == 1 else layer.B * layer.scaling
    return A, B, present[0].scaling if len(scalings) == 1 else 1.0


def stacks(layers: Mapping[str, AdapterLayer]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Path of each stacked parameter → what `joined` makes of its experts' layers."""
    found: dict[str, dict[int, AdapterLayer]] = defaultdict(dict)
    for path, layer in layers.items():
        if layer.stack:
            parameter, _, expert = path.rpartition(".")
            found[parameter][int(expert)] = layer
    return {path: joined([of.get(i) for i in range(next(iter(of.values())).stack)]) for path, of in found.items()}


def to_tensors(stacked: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    """Stacks as PEFT's file has them."""
    found: dict[str, Tensor] = {}
    for path, (A, B, _) in stacked.items():
        owner, _, name = path.rpartition(".")
        others = [p.rpartition(".")[2] for p in stacked if p != path and p.rpartition(".")[0] == owner]
        inner = any(_in_order(other) > _in_order(name) for other in others)
        where = f"{owner}.base_layer" if inner else owner
        found[tensor_name(where, "A")] = A.flatten(0, 1)
        found[tensor_name(where, "B")] = B.permute(1, 2, 0).flatten(1)
    return found


def split_stacks(
    where: str, settings: PeftSettings, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, AdapterLayer], dict[str, Tensor]]:
    """(the experts' layers, the other tensors). Raises AdapterFileError for what doesn't fit `target_parameters`."""
    targets = settings.target_parameters
    if not targets:
        return {}, dict(tensors)
    found: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    left: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = _PAIR.fullmatch(name)
        path = "" if match is None else bare_path(match["path"])
        if match is None or not _names_of(path, targets):
            left[name] = value
            continue
        check_dtype(where, name, value)
        pair = found[path][match["inner"].count("base_layer")]
        if match["role"] in pair:
            raise AdapterFileError(
                f"{where}: {name!r} is a second lora_{match['role']} of {path!r}: two adapters in a file. Save each by itself."
            )
        pair[match["role"]] = value
    if lost := [target for target in targets if not any(target in _named(owner, [target]) for owner in found)]:
        raise AdapterFileError(
            f"{where}: holds nothing for target_parameters {lost[0]!r}: the two files don't belong together; fetch both again"
        )
    layers: dict[str, AdapterLayer] = {}
    for owner, by_depth in found.items():
        names = _names_of(owner, targets)
        if len(by_depth) != len(names):
            raise AdapterFileError(
                f"{where}: {owner!r} has {len(by_depth)} adapted parameters, and target_parameters names {', '.join(names)} "
                "there, so which is which is unknown. Save it again with the parameters of that model alone."
            )
        for name, depth in zip(names, sorted(by_depth, reverse=True), strict=True):
            layers |= _experts(where, settings, f"{owner}.{name}", by_depth[depth])
    return layers, left


def _names_of(owner: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that `target_parameters` names, in the module's order."""
    names = {target.rpartition(".")[2] for target in _named(owner, targets)}
    return sorted(names, key=_in_order)


def _in_order(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


def _named(owner: str, targets: Sequence[str]) -> list[str]:
    """Those of the targets that are parameters of this module."""
    found = []
    for target in targets:
        parent = target.rpartition(".")[0]
        if owner == parent or (parent and owner.endswith(f".{parent}")) or (not parent and owner.rpartition(".")[2] == _OWNER):
            found.append(target)
    return found


def _experts(where: str, settings: PeftSettings, path: str, pair: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    if pair.keys() != {"A", "B"}:
        lost = "B" if "A" in pair else "A"
        raise AdapterFileError(f"{where}: {path!r} lacks its lora_{lost}: the file is incomplete. Fetch or save it again.")
    A, B, rank = pair["A"], pair["B"], settings.layer_rank(path)
    count, rest = divmod(len(A), rank) if A.ndim == B.ndim == 2 else (0, 0)
    if rest or count < 1 or B.shape[1] != len(A):
        raise AdapterFileError(
            f"{where}: the adapter of {path!r} is {tuple(A.shape)} and {tuple(B.shape)}; expected (experts · {rank}, in) and "
            f"(out, {rank} · experts) with the rank that the configuration says. The two files don't belong together."
        )
    scaling = settings.layer_scaling(path)
    if count == 1:  # an ordinary weight, which target_parameters may name as well
        return {path.removesuffix(".weight"): AdapterLayer(A, B, scaling)}
    A_ERI, B_EOR = A.view(count, rank, -1), B.view(len(B), rank, count).permute(2, 0, 1)
    return {
        f"{path}.{expert}": AdapterLayer(A_ERI[expert].clone(), B_EOR[expert].contiguous(), scaling, stack=count)
        for expert in range(count)
    }


def one_of_each(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The layers, and of each stack one that has the rank and scaling which the stack has in a file, under the stack's path."""
    found = {path: layer for path, layer in layers.items() if not layer.stack}
    for path, (A, B, scaling) in stacks(layers).items():
        found[path] = AdapterLayer(A[0], B[0], scaling, stack=len(A))
    return found
