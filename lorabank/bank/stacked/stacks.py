"""Stacked expert weights: one 3-D parameter that holds a matrix an expert, as transformers 5 keeps those of mixture models.

What says how a module computes with them is transformers' public interface for experts: a class that is registered with it
(`use_experts_implementation`) tells whether there is a gate, biases, and which way round a matrix lies. Others aren't guessed.
Shapes: E experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAID = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
"""Attributes that the interface gives a module, and every such module has."""
_PICKED = ("Ernie4_5_VL",)
"""Beginnings of names of classes that give their experts some of the tokens only, so which row one is of isn't known."""


class ExpertStack(nn.Module):
    """One stacked parameter of an experts module, as `targets` and adapters see it. It stands nowhere in the model."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["experts"], self.__dict__["name"] = experts, name
        self._parameters["weight"] = experts._parameters[name]

    experts: nn.Module
    name: str

    @property
    def count(self) -> int:
        """E."""
        return self.get_parameter("weight").shape[0]

    @property
    def turned(self) -> bool:
        """Whether a matrix is stored (in, out)."""
        return bool(vars(self.experts)["is_transposed"])

    @property
    def size(self) -> tuple[int, int]:
        """(in, out) of one expert."""
        _, rows, columns = self.get_parameter("weight").shape
        return (rows, columns) if self.turned else (columns, rows)

    @property
    def weight_EIO(self) -> Tensor:
        """The stack as products take it, a view."""
        weight = self.get_parameter("weight")
        return weight if self.turned else weight.transpose(1, 2)

    def part(self, expert: int) -> nn.Module:
        """One expert's matrix as a layer of its own, which shares its storage with the stack."""
        size_in, size_out = self.size
        with torch.device("meta"):
            made = Conv1D(size_out, size_in) if self.turned else nn.Linear(size_in, size_out, bias=False)
        weight = self.get_parameter("weight").detach()[expert]
        made.weight = nn.Parameter(weight, requires_grad=False)
        if self.turned:  # such a layer always has one
            made.bias = nn.Parameter(weight.new_zeros(size_out), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: an experts module computes with its stacks, they don't."""
        raise NotImplementedError


def stacks_of(module: nn.Module) -> dict[str, ExpertStack]:
    """The stacks of a module that experts are registered with, by name; none where it isn't one that can be adapted."""
    if obstacle(module) is not None:
        return {}
    return {name: ExpertStack(module, name) for name in _names(module)}


def obstacle(module: nn.Module) -> str | None:
    """Why a module's stacked weights can't be adapted, None where they can; for one without such weights too."""
    said = vars(module)
    if not is_registered(module):
        return "it isn't registered with transformers' interface for experts"
    if "__wrapped__" not in vars(type(module).forward) or "forward" in said:
        return "it has a forward of its own"
    names = _names(module)
    present = [module._parameters.get(name) for name in names]
    if any(p is None or is_lazy(p) or p.ndim != 3 or p.shape[0] != said["num_experts"] for p in present):
        return f"its weights aren't {' and '.join(names)} with a matrix an expert"
    if any(p is not None and p.dtype not in FLOATS for p in present):
        return "its weights are quantised"
    if said.get("_is_expert_parallel"):
        return "its experts are spread over several processes"
    if type(module).__name__.startswith(_PICKED):
        return "its experts get some of the tokens only, whose rows aren't known"
    return None


def is_registered(module: nn.Module) -> bool:
    """Whether a module is one of transformers' interface for experts, whatever its weights are."""
    return all(name in vars(module) for name in _SAID)


def _names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if vars(module)["has_gate"] else "up_proj"), "down_proj"
