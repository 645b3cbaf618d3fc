"""What combined adapters trained as a whole: biases, token rows and modules in full, whose sum of changes needs no base.

Each is a value v in place of the base's v₀, so the sum of changes gives v₀ + Σ wᵢ (vᵢ − v₀) over the adapters that have it: this
is Σ wᵢ vᵢ where these adapters' weights sum to 1, whatever the others' are. Another sum needs v₀, which `combine` hasn't got, and
is refused. A classifier's head that a base lacks is no change of anything: the one adapter that has it gives it as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabank.bank.in_full.heads import PEFT_HEADS
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.formats.token_rows import TokenRows
from lorabank.merging.weights import Weights

Weighted = Sequence[tuple[Adapter, Weights]]


@dataclass(frozen=True, kw_only=True)
class Wholes:
    """Those of a combination."""

    biases: Mapping[str, Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Term:
    adapter: Adapter
    name: str
    """What messages call the adapter."""
    weight: float


def wholes_of(parts: Weighted, called: Sequence[str]) -> Wholes:
    """Σ wᵢ vᵢ of each, called what `called` says in messages. Raises MergeError where the sum of changes isn't that."""
    biases: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.biases):
        what = f"the bias of {path!r} is"
        having = _having(what, [path in adapter.biases for adapter, _ in parts], parts, called)
        if having:
            _check_sum(what, having)
            biases[path] = _sum(what, [(term, term.adapter.biases[path]) for term in having])
    rows: dict[str, TokenRows] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.token_rows):
        if made := _rows(path, parts, called):
            rows[path] = made
    modules: dict[str, dict[str, Tensor]] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.modules):
        if values := _module(path, parts, called):
            modules[path] = values
    _check_apart(parts, called, modules)
    return Wholes(biases=biases, token_rows=rows, modules=modules)


def task_of(parts: Weighted, modules: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """PEFT's task type of the combination: of the adapter whose head it has, else the first that is known."""
    heads = [
        adapter.task_type for adapter, _ in parts if any(path in modules and _is_head(adapter, path) for path in adapter.modules)
    ]
    lost = {adapter.task_type for adapter, _ in parts if any(_is_head(adapter, path) for path in adapter.modules)} - {*heads}
    known = [adapter.task_type for adapter, _ in parts if adapter.task_type and adapter.task_type not in lost]
    return next(iter((*heads, *known)), None)


def _having(what: str, has: Sequence[bool], parts: Weighted, called: Sequence[str]) -> list[_Term]:
    """The adapters that have a value and a weight other than 0."""
    found: list[_Term] = []
    for own, name, (adapter, weight) in zip(has, called, parts, strict=True):
        if own and not isinstance(weight, int | float):
            raise MergeError(f"combine: {what} trained as a whole, and {name} has weights by part. Give it one number.")
        if own and isinstance(weight, int | float) and weight != 0:
            found.append(_Term(adapter, name, float(weight)))
    return found


def _check_sum(what: str, having: Sequence[_Term]) -> None:
    if math.isclose(math.fsum(term.weight for term in having), 1.0, abs_tol=1e-9):
        return
    each = ", ".join(f"{term.weight:g} of {term.name}" for term in having)
    raise MergeError(
        f"combine: {what} trained as a whole, so a sum of changes needs the base's own, unless the weights of the adapters that "
        f"have this sum to 1; they are {each}. Choose such weights, or route rows to a mixture."
    )


def _sum(what: str, values: Sequence[tuple[_Term, Tensor]]) -> Tensor:
    for term, value in values:
        if not value.isfinite().all():
            raise MergeError(
                f"combine: {what} NaN or infinity in part in {term.name}: its training diverged. Use an earlier checkpoint of it."
            )
        if value.shape != values[0][1].shape:
            raise MergeError(
                f"combine: {what} {tuple(values[0][1].shape)} in {values[0][0].name} and {tuple(value.shape)} in {term.name}; "
                "they belong to different bases, or have other numbers of labels or tokens."
            )
    dtype = torch.float32
    for _, value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    first, value = values[0]
    total = first.weight * value.detach().to(dtype)  # one value of the weight 1 stays itself to the bit
    for term, value in values[1:]:
        total += term.weight * value.detach().to(total.device, dtype)
    return total


def _rows(path: str, parts: Weighted, called: Sequence[str]) -> TokenRows | None:
    """The rows of a table that any adapter has; each token's weights sum to 1 by themselves."""
    what = f"the token rows of {path!r} are"
    having = _having(what, [path in adapter.token_rows for adapter, _ in parts], parts, called)
    at = [{token: place for place, token in enumerate(term.adapter.token_rows[path].ids)} for term in having]
    groups: dict[tuple[int, ...], list[int]] = {}
    for token in dict.fromkeys(token for places in at for token in places):
        groups.setdefault(tuple(i for i, places in enumerate(at) if token in places), []).append(token)
    made: dict[int, Tensor] = {}
    for owners, tokens in groups.items():
        _check_sum(what if len(groups) == 1 else _rows_called(path, tokens), [having[i] for i in owners])
        held = [(having[i], having[i].adapter.token_rows[path].rows[[at[i][token] for token in tokens]]) for i in owners]
        made |= dict(zip(tokens, _sum(what, held), strict=True))
    if not made:
        return None
    rows = list(made.values())
    dtype = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)
    return TokenRows(tuple(made), torch.stack([row.to(rows[0].device, dtype) for row in rows]))


def _rows_called(path: str, tokens: Sequence[int]) -> str:
    if len(tokens) == 1:
        return f"the row of token {tokens[0]} in {path!r} is"
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return f"the rows of tokens {', '.join(map(str, tokens[:3]))}{more} in {path!r} are"


def _module(path: str, parts: Weighted, called: Sequence[str]) -> dict[str, Tensor] | None:
    """A module in full of all adapters that have it."""
    what = f"module {path!r} is"
    having = _having(what, [path in adapter.modules for adapter, _ in parts], parts, called)
    if not having:
        return None
    tasks = {term.adapter.task_type for term in having if _is_head(term.adapter, path)}
    if len(tasks) > 1:
        raise MergeError(
            f"combine: module {path!r} is the head of different tasks ({', '.join(sorted(map(str, tasks)))}), which have no sum. "
            "Give all but one of these adapters the weight 0, or route rows to them."
        )
    first = having[0]
    for term in having:
        if wrong := sorted(term.adapter.modules[path].keys() ^ first.adapter.modules[path].keys()):
            raise MergeError(f"combine: module {path!r} has {wrong[0]!r} in only one of {first.name} and {term.name}")
    if len(having) == 1 and first.weight != 1 and _is_head(first.adapter, path):
        warnings.warn(
            f"combine: {path!r} of {first.name} is taken as it is, whatever its weight: a head that was made for new labels "
            "isn't a change of the base's.",
            stacklevel=6,
        )
        having = [_Term(first.adapter, first.name, 1.0)]
    _check_sum(what, having)
    found: dict[str, Tensor] = {}
    for key, value in first.adapter.modules[path].items():
        values = [(term, term.adapter.modules[path][key]) for term in having]
        if value.is_floating_point():
            found[key] = _sum(f"{key!r} of module {path!r} is", values)
        elif any(not torch.equal(value, other) for _, other in values):
            raise MergeError(f"combine: {key!r} of module {path!r} is no parameter, and differs between the adapters")
        else:
            found[key] = value.clone()
    return found


def _is_head(adapter: Adapter, path: str) -> bool:
    """Whether a module is the head that PEFT's task type has made anew."""
    return path.endswith(PEFT_HEADS.get(adapter.task_type or "", ()))


def _check_apart(parts: Weighted, called: Sequence[str], modules: Mapping[str, object]) -> None:
    """Raise MergeError where what one adapter trained in full another changes otherwise, and for heads of two tasks."""
    for path in modules:
        owner = next(name for (adapter, _), name in zip(parts, called, strict=True) if path in adapter.modules)
        for (adapter, _), name in zip(parts, called, strict=True):
            other = {**adapter.layers, **adapter.biases, **adapter.token_rows}
            if inner := next((place for place in other if place == path or place.startswith(f"{path}.")), None):
                raise MergeError(
                    f"combine: {path!r} was trained in full in {owner}, and {inner!r} is changed otherwise in {name}, which "
                    "don't go together. Leave one of them out."
                )
            if inner := next((place for place in adapter.modules if place != path and place.startswith(f"{path}.")), None):
                raise MergeError(
                    f"combine: {path!r} was trained in full in {owner}, and {inner!r} in it in {name}; leave one out."
                )
    heads = {a.task_type: path for a, _ in parts for path in a.modules if path in modules and _is_head(a, path)}
    if len(heads) > 1:
        each = " and ".join(f"{path!r} of {task}" for task, path in heads.items())
        raise MergeError(
            f"combine: {each} are heads of different tasks, which no model has both. Give the others the weight 0, or route rows "
            "to them."
        )
