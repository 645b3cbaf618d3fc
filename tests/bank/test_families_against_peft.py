"""Any architecture: the same LoRA in PEFT's model and in a bank gives the same answers and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lorabank import Adapter, attach
from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.layers import LoRALayer
from tests.bank.families import FAMILIES
from tests.bank.family import ROWS, Family, answers, bank_of, check_close, check_gradients, loss
from tests.bank.tiny import gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rank 2 is above what layer"),  # gates of one feature, and the like
]
KINDS = {
    "decoder": 30,
    "mixture of experts": 10,
    "state-space": 8,
    "encoder": 20,
    "encoder-decoder": 12,
    "vision": 25,
    "audio": 10,
    "text and pictures": 10,
    "time series": 2,
}


def test_there_are_families_of_every_kind() -> None:
    found = [family.kind for family in FAMILIES.values()]
    assert {kind: found.count(kind) >= least for kind, least in KINDS.items()} == dict.fromkeys(KINDS, True)
    assert set(found) == set(KINDS)


def _in_peft(base: torch.nn.Module, folder: Path, family: Family) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Answers and gradients of PEFT's own model, which reads our folder."""
    wrapped = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    found = answers(wrapped.get_base_model(), family)
    loss(found).backward()
    grads = {}
    for name, p in wrapped.named_parameters():
        path, lora, role = name.removeprefix("base_model.model.").partition(".lora_")
        if lora:
            role = role[0]
            g = torch.zeros_like(p) if p.grad is None else p.grad
            owner = wrapped.get_base_model().get_submodule(path)
            if type(owner).__name__ == "ParamWrapper":  # of stacked experts
                path = f"{path.removesuffix('.base_layer')}.{owner.parameter_name}"
                g = g if role == "A" else g.view(len(g), -1, owner.num_experts).permute(2, 1, 0).flatten(0, 1).t()
            elif type(owner).__name__ == "MultiheadAttention":
                path = f"{path}.in_proj"
            elif path.endswith(".base_layer.out_proj"):
                path = path.replace(".base_layer", "")
                g = 2 * g if role == "A" else g  # its change is added twice, once past autograd; the file's B is half as large
            grads[f"a:{path}.{role}"] = g.flatten(1) if role == "A" else g.flatten(1).t()
    return [t.detach() for t in found], grads


@pytest.mark.parametrize("name", FAMILIES)
def test_pefts_answers_and_gradients_are_ours(name: str, tmp_path: Path) -> None:
    """Through the file: ours is read by PEFT and by ourselves."""
    family = FAMILIES[name]
    bank = bank_of(family, exclude=family.peft)
    bank.adapter("a").save(tmp_path / "a")
    model = bank.detach()
    with torch.no_grad():
        base = answers(copy.deepcopy(model), family)
    expected, grads = _in_peft(copy.deepcopy(model), tmp_path / "a", family)
    assert any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=0) for a, b in zip(base, expected, strict=True))
    bank = attach(model)
    bank.load("a", Adapter.load(tmp_path / "a"))
    if not family.left and not family.peft and family.targets[0] == "all-linear":
        assert not bank.summary().unadapted
    sizes = _first_sizes(bank)
    found = answers(model, family)
    assert {path: found for path, found in sizes.items() if found - {ROWS, 1}} == {}
    check_close(found, expected)
    loss(found).backward()
    check_gradients(gradients(bank), grads)


def _first_sizes(bank: AdapterBank) -> dict[str, set[int]]:
    """What first dimensions inputs come to have, of layers that aren't said to be given others than the batch's rows.

    An undeclared one that happens to be as long as the batch would be misread.
    """
    sizes: dict[str, set[int]] = {}

    def see(layer: Any, args: tuple[Tensor, ...]) -> None:
        sizes.setdefault(layer.path, set()).add(args[0].shape[0])

    for layer in all_layers(bank):
        if isinstance(layer, LoRALayer) and layer.rows_lost is None and layer.folded is None:
            layer.register_forward_pre_hook(see)
    return sizes
