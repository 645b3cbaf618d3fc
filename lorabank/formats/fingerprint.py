"""`Fingerprint`: which base an adapter belongs to, told by sampled values and not by names, versions or hashes.

A hash would refuse the same base in another dtype, and a configuration would accept another checkpoint of the same size.
So a bounded number of tensors is sampled at fixed positions and compared within the rounding of 16-bit floats. Tensors are
chosen by a hash of their name, so that two models which differ in a few names still share most of the choice, and from three
groups (embeddings, vectors, matrices), so that a base whose matrices are quantised still shares the other two.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabank.config.checks import is_finite
from lorabank.errors import AdapterFileError

SAMPLED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TENSORS_PER_GROUP = {"embedding": 4, "vector": 12, "matrix": 16}
TRIES_PER_TENSOR = 4
"""Tensors of one value (fresh norms and biases) say nothing; at most this many candidates are looked at for each one wanted."""

# Rows are fixed numbers, never shares of the row count: a vocabulary that grew keeps its old positions.
MATRIX_ROWS = (0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 5, 13, 34, 89, 377, 1597)
VECTOR_POSITIONS = (0, 1, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)
GOLDEN = 0.6180339887498949

RELATIVE_TOLERANCE = 2**-8  # twice bfloat16's rounding, for a base that was rounded twice
ABSOLUTE_TOLERANCE = 1e-7  # float16 has no smaller steps near zero


@dataclass(frozen=True, kw_only=True)
class SampledTensor:
    """One parameter's shape and some of its values."""

    shape: tuple[int, ...]
    vocabulary: bool
    """Whether dimension 0 counts tokens, and so may grow or shrink on the same base."""
    values: tuple[float | None, ...]
    """At `positions(shape)`, six significant digits; None where not finite. Empty for a meta tensor."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Shapes and sampled values of a base model. Equal bases in any float dtype are compatible, other bases are not."""

    tensors: Mapping[str, SampledTensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        without: Collection[str] = (),
        named: Callable[[str], str] = lambda name: name,
        unwrapped: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> Fingerprint:
        """Sample at most 32 parameters of `model`; reads a few hundred numbers, whatever the model's size.

        `without`: names of parameters that train beside the base, and are no part of it. `named`: a parameter's name in the
        model → in the base, where that is wrapped. `unwrapped`: a module of the model → the base's own.
        """
        left_out = {name for name, _ in model.named_buffers()} | {*without}  # running statistics move too
        here = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor) and name not in left_out}
        state = {named(name): value for name, value in here.items()}
        embeddings = {
            named(f"{path}.weight" if path else "weight")
            for path, module in model.named_modules()
            if isinstance(unwrapped(module), nn.Embedding)
        }
        vocabulary_sizes = {state[name].shape[0] for name in embeddings if name in state}
        groups: dict[str, list[str]] = {group: [] for group in TENSORS_PER_GROUP}
        for name, value in state.items():
            if value.dtype in SAMPLED_DTYPES and value.ndim > 0 and value.numel() > 0 and not _is_quantizer_state(name, state):
                groups["embedding" if name in embeddings else "vector" if value.ndim == 1 else "matrix"].append(name)
        picked: dict[str, SampledTensor] = {}
        constant: dict[str, SampledTensor] = {}
        for group, names in groups.items():
            for name, sample in _pick(state, names, TENSORS_PER_GROUP[group], vocabulary_sizes):
                (picked if _informative(sample) else constant)[name] = sample
        return cls(tensors=dict(sorted((picked or constant).items())))

    def compare(self, other: Fingerprint) -> str | None:
        """None if both can be the same base, else one sentence on the first difference ('recorded' is self, 'here' is other)."""
        shared = [name for name in self.tensors if name in other.tensors]
        if not shared and self.tensors:
            first = next(iter(self.tensors))
            return f"none of the recorded parameters is found here: {first!r} for one"
        for name in shared:
            difference = _difference(self.tensors[name], other.tensors[name])
            if difference:
                return f"parameter {name!r} {difference}"
        return None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form; `from_dict` reads it back to an equal value."""
        return {
            "version": 1,
            "tensors": {
                name: {"shape": list(sample.shape), "vocabulary": sample.vocabulary, "values": list(sample.values)}
                for name, sample in self.tensors.items()
            },
        }

    @classmethod
    def from_dict(cls, data: object) -> Fingerprint:
        """Read `to_dict`'s form. Raises AdapterFileError for anything else."""
        if not isinstance(data, Mapping) or data.get("version") != 1 or not isinstance(data.get("tensors"), Mapping):
            raise AdapterFileError(
                "fingerprint: expected an object with 'version': 1 and 'tensors'. It was written by a newer lorabank or altered; "
                "remove it from the file to load the adapter without a check of its base."
            )
        return cls(tensors={str(name): _sample_from(str(name), entry) for name, entry in sorted(data["tensors"].items())})


def positions(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sampled indices of a tensor; those of a longer dimension 0 begin with those of a shorter one."""
    if len(shape) == 1:
        return [(i,) for i in VECTOR_POSITIONS if i < shape[0]]
    found: dict[tuple[int, ...], None] = {}
    for i, row in enumerate(MATRIX_ROWS):
        if row < shape[0]:
            share = math.modf((i + 1) * GOLDEN)[0]
            found[(row, *(int(math.modf(share * (d + 1))[0] * size) for d, size in enumerate(shape[1:])))] = None
    return list(found)


def _pick(
    state: Mapping[str, Tensor], names: list[str], wanted: int, vocabulary_sizes: set[int]
) -> Iterator[tuple[str, SampledTensor]]:
    """Samples in the order of their names' hashes until `wanted` of them carry information."""
    informative = 0
    for name in sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))[: wanted * TRIES_PER_TENSOR]:
        value = state[name]
        sample = sampled(value, vocabulary=value.shape[0] in vocabulary_sizes)
        yield name, sample
        informative += _informative(sample)
        if informative == wanted:
            return


def sampled(value: Tensor, *, vocabulary: bool) -> SampledTensor:
    """A parameter's shape and values at its positions."""
    return SampledTensor(shape=tuple(value.shape), vocabulary=vocabulary, values=_sample(value))


def _sample(value: Tensor) -> tuple[float | None, ...]:
    if value.is_meta:
        return ()
    where = positions(tuple(value.shape))
    index = tuple(torch.tensor(axis, device=value.device) for axis in zip(*where, strict=True))  # no copy of the whole tensor
    numbers: list[float] = value.detach()[index].to("cpu", torch.float32).tolist()
    return tuple(float(f"{number:.6g}") if math.isfinite(number) else None for number in numbers)


def _informative(sample: SampledTensor) -> bool:
    # A meta tensor has only its shape to give, and gives it.
    return not sample.values or len(set(sample.values)) > 1 or math.prod(sample.shape) == 1


def _is_quantizer_state(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether `name` belongs to a weight that isn't stored as numbers of its own: it lies beneath that weight's name
    (`q_proj.weight.absmax`), continues it (`q_proj.weight_scale`), or is packed into another dtype."""
    parent, _, leaf = name.rpartition(".")
    weight = f"{parent}.weight" if parent else "weight"
    beside = leaf.startswith("weight_") and weight in state and state[weight].dtype not in SAMPLED_DTYPES
    packed = f"{name}.absmax" in state and state[name].shape[1:] == (1,)
    return parent in state or beside or packed


def _difference(recorded: SampledTensor, here: SampledTensor) -> str | None:
    same_rows = recorded.shape[0] == here.shape[0] or recorded.vocabulary or here.vocabulary
    if len(recorded.shape) != len(here.shape) or recorded.shape[1:] != here.shape[1:] or not same_rows:
        return f"has the shape {here.shape} here, recorded was {recorded.shape}"
    values_here = dict(zip(positions(here.shape), here.values, strict=False))
    for position, expected in zip(positions(recorded.shape), recorded.values, strict=False):
        found = values_here.get(position, expected)
        if not _close(expected, found):
            return f"holds {found} at {list(position)} here, recorded was {expected}"
    return None


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b)) + ABSOLUTE_TOLERANCE


def _sample_from(name: str, entry: object) -> SampledTensor:
    problem = AdapterFileError(f"fingerprint: the entry of {name!r} should hold a shape and values, got {str(entry)[:120]}")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("shape"), list) or not isinstance(entry.get("values"), list):
        raise problem
    shape, values = entry["shape"], entry["values"]
    if not shape or not all(type(size) is int and 0 < size < 2**63 for size in shape):
        raise problem
    if not all(value is None or (type(value) in (int, float) and is_finite(value)) for value in values):
        raise problem
    if len(values) not in (0, len(positions(tuple(shape)))):
        raise problem
    return SampledTensor(
        shape=tuple(shape),
        vocabulary=entry.get("vocabulary") is True,
        values=tuple(None if value is None else float(value) for value in values),
    )
