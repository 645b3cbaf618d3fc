from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lorabank.errors import AdapterFileError
from lorabank.formats.fingerprint import Fingerprint, positions

Make = Callable[..., LlamaForCausalLM]


def both_ways(a: Fingerprint, b: Fingerprint) -> list[str | None]:
    return [a.compare(b), b.compare(a)]


def test_trap14_other_seed_differs_and_says_where(make_llama: Make) -> None:
    difference = Fingerprint.of(make_llama(0)).compare(Fingerprint.of(make_llama(1)))
    assert difference is not None
    assert difference.startswith("parameter '")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_trap14_same_base_in_another_dtype_passes(make_llama: Make, dtype: torch.dtype) -> None:
    recorded = Fingerprint.of(make_llama())
    assert both_ways(recorded, Fingerprint.of(make_llama().to(dtype))) == [None, None]
    assert both_ways(recorded, Fingerprint.of(make_llama(1).to(dtype))) != [None, None]


def test_a_base_changed_by_one_percent_differs(make_llama: Make) -> None:
    model = make_llama()
    recorded = Fingerprint.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert recorded.compare(Fingerprint.of(model)) is not None


@pytest.mark.parametrize("rows", [40, 64, 71, 5000])
def test_vocabulary_may_grow_or_shrink(make_llama: Make, rows: int) -> None:
    model = make_llama()
    recorded = Fingerprint.of(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert both_ways(recorded, Fingerprint.of(model)) == [None, None]


def test_a_resized_layer_that_is_no_vocabulary_differs(make_llama: Make) -> None:
    difference = Fingerprint.of(make_llama()).compare(Fingerprint.of(make_llama(hidden=16)))
    assert difference is not None
    assert "shape" in difference


def test_quantised_matrices_are_skipped_and_the_rest_still_tells(make_llama: Make) -> None:
    def quantised(seed: int) -> LlamaForCausalLM:
        model = make_llama(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
                module.weight = nn.Parameter(packed, requires_grad=False)
        return model

    recorded = Fingerprint.of(make_llama(0))
    assert both_ways(recorded, Fingerprint.of(quantised(0))) == [None, None]
    assert None not in both_ways(recorded, Fingerprint.of(quantised(1)))


def test_a_quantizers_own_tensors_are_not_sampled() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {**super().state_dict(), "linear.weight.absmax": torch.rand(9)}

    assert set(Fingerprint.of(Quantised()).tensors) == {"linear.weight", "linear.bias"}


def test_another_architecture_is_named() -> None:
    difference = Fingerprint.of(nn.Linear(4, 3)).compare(Fingerprint.of(nn.Sequential(nn.Linear(4, 3))))
    assert difference is not None
    assert "none of the recorded parameters" in difference


def test_constant_tensors_are_left_out_where_others_tell_more(make_llama: Make) -> None:
    assert not any("norm" in name for name in Fingerprint.of(make_llama()).tensors)
    zeros = nn.Linear(4, 3)
    nn.init.zeros_(zeros.weight)
    nn.init.zeros_(zeros.bias)
    assert Fingerprint.of(zeros).compare(Fingerprint.of(nn.Linear(4, 3))) is not None


def test_running_statistics_may_move() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = Fingerprint.of(model)
    model.train()(torch.randn(8, 4))
    assert before.compare(Fingerprint.of(model)) is None


def test_integers_scalars_and_empty_tensors_are_skipped() -> None:
    model = nn.Linear(4, 3)
    model.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    model.register_parameter("scale", nn.Parameter(torch.tensor(3.0)))
    model.register_parameter("none", nn.Parameter(torch.empty(0, 4)))
    assert set(Fingerprint.of(model).tensors) == {"weight", "bias"}


def test_a_meta_model_is_compared_by_shape_in_milliseconds(make_llama: Make) -> None:
    with torch.device("meta"):
        empty, large = make_llama(), make_llama(layers=80)
    assert Fingerprint.of(make_llama()).compare(Fingerprint.of(empty)) is None
    start = time.perf_counter()
    found = Fingerprint.of(large)
    assert time.perf_counter() - start < 1  # milliseconds in fact; a busy machine is allowed to be slow
    assert 16 <= len(found.tensors) <= 32


def test_time_does_not_grow_with_the_weights() -> None:
    large = nn.Linear(4096, 4096)
    small = copy.deepcopy(nn.Linear(4, 4))
    assert len(Fingerprint.of(large).tensors["weight"].values) <= 16
    assert len(Fingerprint.of(small).tensors["weight"].values) <= 16


def test_positions_of_more_rows_begin_with_those_of_fewer() -> None:
    for tail in [(), (7,), (3, 2, 2)]:
        few, many = positions((20, *tail)), positions((2000, *tail))
        assert many[: len(few)] == few
        assert all(all(0 <= i < n for i, n in zip(p, (2000, *tail), strict=True)) for p in many)


def test_json_round_trip_and_not_a_number(make_llama: Make) -> None:
    model = make_llama()
    model.model.embed_tokens.weight.data[0] = float("nan")
    recorded = Fingerprint.of(model)
    again = Fingerprint.from_dict(json.loads(json.dumps(recorded.to_dict(), allow_nan=False)))
    assert again == recorded
    assert recorded.compare(recorded) is None
    assert recorded.compare(Fingerprint.of(make_llama())) is not None


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"version": 2, "tensors": {}},
        {"version": 1, "tensors": []},
        {"version": 1, "tensors": {"x": {"shape": [], "values": []}}},
        {"version": 1, "tensors": {"x": {"shape": [2, -1], "values": []}}},
        {"version": 1, "tensors": {"x": {"shape": [2, 2], "values": ["1"]}}},
        {"version": 1, "tensors": {"x": {"shape": [2, 2], "values": [1.0]}}},
    ],
)
def test_malformed_fingerprints_are_refused(data: object) -> None:
    with pytest.raises(AdapterFileError, match="fingerprint"):
        Fingerprint.from_dict(data)
