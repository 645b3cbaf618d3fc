"""`nn.MultiheadAttention`'s projections as layers: it holds their weights and never calls a module for them.

They are `in_proj` (q, k and v in one weight; `q_proj`, `k_proj` and `v_proj` where key and value have features of their own) and
`out_proj`, under the module's path. Each is a linear layer that shares its storage with the module.
Shapes: E features of the module, rows of a weight are outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lorabank.bank.kinds import LAYER_KINDS, layer_kind
from lorabank.bank.slices import FusedSlice
from lorabank.formats.patterns import pattern_value

T = TypeVar("T", int, float)
IN, OUT = "in_proj", "out_proj"
APART = ("q_proj", "k_proj", "v_proj")
"""In the order of their rows in the bias that they have in common."""
ROLES = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": (OUT,)}
"""Role → the projections that play it; other roles tell by the whole module."""


class Projection(nn.Linear):
    """One projection of an attention module, or some rows of it. It stands nowhere in the model."""

    def __init__(self, attention: nn.MultiheadAttention, name: str, rows: slice = slice(None)) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make weights
        self.__dict__.update(attention=attention, name=name, rows=rows)
        weight, bias = self._found()
        self.out_features, self.in_features = weight.shape
        # parameters to begin with, so that whoever asks for one is given one; of parts they share the storage
        self._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), False)
        self._parameters["bias"] = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), False)

    attention: nn.MultiheadAttention
    name: str
    rows: slice

    @property
    def fused(self) -> bool:
        """Whether q, k and v of its module are one weight."""
        return self.attention._parameters.get("in_proj_weight") is not None

    @property
    def parameter(self) -> str:
        """Its weight's name in the module."""
        return f"{OUT}.weight" if self.name == OUT else f"{self.name}_weight"

    def refresh(self) -> None:
        """Take the tensors that the module has now; gradients of parts reach the whole."""
        values: dict[str, Tensor | None] = dict(zip(("weight", "bias"), self._found(), strict=True))
        self.__dict__["_parameters"].update(values)

    def _found(self) -> tuple[Tensor, Tensor | None]:
        own = self.attention._parameters
        if self.name == OUT:
            inner = self.attention.out_proj._parameters
            weight, bias = inner["weight"], inner["bias"]
        else:
            weight, bias = own[f"{self.name}_weight"], own["in_proj_bias"]
        assert weight is not None  # `obstacle` has seen to it
        if self.name in APART and bias is not None:
            bias = bias.chunk(3)[APART.index(self.name)]
        if self.rows == slice(None):
            return weight, bias
        return weight[self.rows], None if bias is None else bias[self.rows]


def obstacle(module: nn.MultiheadAttention) -> str | None:
    """Why the projections of an attention module can't be adapted, None where they can."""
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
        return "it has a forward of its own"
    weights = [module._parameters.get(f"{name}_weight") for name in _names(module)[:-1]]
    if any(weight is None or is_lazy(weight) or not weight.is_floating_point() for weight in weights):
        return "its in_proj isn't a plain weight (parametrized, or quantised)"
    if layer_kind(module.out_proj) is not LAYER_KINDS[nn.Linear]:
        return f"its out_proj is a {type(module.out_proj).__name__} with a weight or forward of its own"
    return None


def in_attention(layer: nn.Module) -> bool:
    """Whether a layer is a projection of an `nn.MultiheadAttention`, or a slice of one."""
    return isinstance(layer.layer if isinstance(layer, FusedSlice) else layer, Projection)


def projections_of(module: nn.Module) -> dict[str, Projection]:
    """The projections of an attention module by name, in their order; none of other modules and of those with an obstacle."""
    if not isinstance(module, nn.MultiheadAttention) or obstacle(module) is not None:
        return {}
    return {name: Projection(module, name) for name in _names(module)}


def plays(role: str, layer: Projection, by_path: bool) -> bool:
    """Whether a projection plays a role of `targets`; `by_path`: whether its path says that it does."""
    if role in ROLES:
        return layer.name in ROLES[role]
    return role == "attention" or (role == "cross-attention" and by_path)


def patterned(patterns: Mapping[str, T], path: str, layer: nn.Module, default: T) -> T:
    """The value of the first pattern that matches a layer's path, or its attention module's as PEFT's patterns do."""
    if not isinstance(layer, Projection):
        return pattern_value(patterns, path, default)
    for pattern, value in patterns.items():
        if any(pattern_value({pattern: 1}, each, 0) for each in (path, path.rpartition(".")[0])):
            return value
    return default


def weight_name(path: str, layer: nn.Module) -> str:
    """The name of a layer's weight among the model's parameters."""
    if isinstance(layer, Projection):
        return f"{path.rpartition('.')[0]}.{layer.parameter}".lstrip(".")
    return f"{path}.weight".lstrip(".")


def _names(module: nn.MultiheadAttention) -> tuple[str, ...]:
    return (IN, OUT) if module._qkv_same_embed_dim else (*APART, OUT)
