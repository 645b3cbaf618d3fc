"""What merges, combinations and banks are given that isn't an adapter, or is a broken one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorabank as lb
from lorabank.errors import AdapterFileError, MergeError
from tests.bank.tiny import add, llama, state_bytes


def _not_adapters(folder: Path) -> list[Callable[[Any], object]]:
    return [
        lambda given: lb.merge(llama(), given),
        lambda given: lb.merge_folder(folder, given, folder / "merged"),
        lambda given: lb.combine([(given, 1.0)]),
    ]


@pytest.mark.parametrize("given", ["out/formal", None, {"q": 1}])
@pytest.mark.parametrize("call", range(3))
def test_what_is_no_adapter_is_named_with_the_way_out(given: Any, call: int, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"expected a lorabank.Adapter, got .*\. lorabank.Adapter.load\(path\) reads one"):
        _not_adapters(tmp_path)[call](given)
    assert not (tmp_path / "merged").exists()


def test_a_value_with_nan_isnt_loaded_unless_it_is_forced() -> None:
    model = llama()
    bank = lb.attach(model)
    add(bank, "a", targets=["q"])
    good, before = bank.adapter("a"), state_bytes(model)
    path, layer = next(iter(good.layers.items()))
    broken = replace(good, layers={**good.layers, path: replace(layer, B=torch.full_like(layer.B, math.nan))})
    with pytest.raises(AdapterFileError, match=rf"adapter 'b': NaN or infinity in {path}\. Use an earlier checkpoint"):
        bank.load("b", broken)
    assert bank.names == ("a",) and state_bytes(model) == before
    bank.load("b", broken, force=True)
    assert not bank.adapter("b").layers[path].B.isfinite().any()
