"""Adapters on convolutions, embeddings and any other map: the fast path against its definition, and that against ΔW itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabank.bank.kinds import layer_kind
from lorabank.errors import RoutingError
from lorabank.kernels import reference
from lorabank.kernels.mapped import add_mapped
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import output_norms
from lorabank.kernels.segments import Decomposition, DropoutDraw, Outputs, Rows, Segment
from tests.kernels.cases import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "wide": (lambda: nn.Linear(6, 8), (3, 6)),
    "conv1d of GPT-2": (lambda: Conv1D(5, 6), (3, 6)),
    "1-D": (lambda: nn.Conv1d(4, 5, 3, padding=1), (4, 7)),
    "2-D": (lambda: nn.Conv2d(4, 5, 3), (4, 5, 6)),
    "3-D": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 3, 4, 3)),
    "1 × 1": (lambda: nn.Conv2d(4, 5, 1, bias=False), (4, 3, 3)),
    "strided": (lambda: nn.Conv2d(4, 5, 3, stride=(2, 3), padding=(1, 2)), (4, 6, 7)),
    "dilated": (lambda: nn.Conv2d(4, 5, (3, 2), dilation=(2, 3), padding=2), (4, 6, 7)),
    "in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (4, 7, 7)),
    "padded by reflection": (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"), (4, 5, 6)),
    "padded in a circle": (lambda: nn.Conv1d(4, 5, 3, padding=2, padding_mode="circular"), (4, 5)),
    "as large as its input": (lambda: nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(1, 3)), (4, 5, 6)),
    "padded more at one end": (lambda: nn.Conv2d(4, 5, (2, 4), padding="same", dilation=(1, 3)), (4, 5, 6)),
    "unpadded by name": (lambda: nn.Conv2d(4, 5, 2, padding="valid"), (4, 5, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), (4,)),
    "embedding with padding": (lambda: nn.Embedding(9, 5, padding_idx=2), (2, 3)),
}
ROWS: dict[str, tuple[list[Rows], int]] = {
    "one slot for everything": ([slice(0, 1)], 1),
    "rows of two slots, others left": ([slice(0, 2), torch.tensor([2, 4])], 5),
    "mixtures": ([slice(0, 4), torch.tensor([4, 0, 2]), slice(1, 1)], 5),
}
SAMPLES = 5


def case(
    name: str, rows: str, *, weighted: bool = False, dropout: float = 0.0, decomposed: bool = False
) -> tuple[nn.Module, Tensor, list[Segment], int]:
    """(layer, its input, segments, units). `decomposed`: all segments but every third."""
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer: nn.Module = make().requires_grad_(False)
    kind = layer_kind(layer)
    assert kind is not None
    fan_in, fan_out = kind.features(layer)
    x = torch.randint(9, (SAMPLES, *size)) if isinstance(layer, nn.Embedding) else torch.randn(SAMPLES, *size)
    where, units = ROWS[rows]
    segments = []
    for i, mine in enumerate(where):
        count = len(torch.arange(units)[mine])
        draw = DropoutDraw(probability=dropout, seed=7 + i, step=3, examples_U=torch.arange(count)) if dropout else None
        A, B = torch.randn(2 + i, fan_in), torch.randn(2 + i, fan_out)
        weights = torch.rand(count) - 0.3 if weighted else None
        segment = Segment(rows=mine, A_RI=A, B_RO=B, scaling=0.5 + i, weights_U=weights, dropout=draw)
        if decomposed and i % 3 < 2:
            norms = output_norms(kind.weight_oi(layer._parameters, None), A, B, segment.scaling)
            parts = Decomposition(magnitude_O=norms * (1 + 0.5 * torch.randn(fan_out)), norm_O=norms)
            segment = replace(segment, decomposition=parts)
        segments.append(segment)
    return layer, x, segments, units


def the_map(layer: nn.Module) -> LowRankMap:
    kind = layer_kind(layer)
    assert kind is not None
    return kind.low_rank_map(layer)


Gradients = dict[str, Tensor | None]


def run(layer: nn.Module, x: Tensor, segments: list[Segment], units: int, *, fast: bool) -> tuple[Tensor, Gradients]:
    """(output, every gradient)."""
    x = x.clone().requires_grad_(x.is_floating_point())
    own, magnitudes = [], dict[str, Tensor]()
    for i, segment in enumerate(segments):
        A, B, parts = (*(t.clone().requires_grad_() for t in (segment.A_RI, segment.B_RO)), segment.decomposition)
        if parts is not None:
            magnitudes[f"magnitude{i}"] = parts.magnitude_O.clone().requires_grad_()
            parts = replace(parts, magnitude_O=magnitudes[f"magnitude{i}"])
        own.append(replace(segment, A_RI=A, B_RO=B, decomposition=parts))
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.grad = None
        bias.requires_grad_()  # it may be trained beside
    y = layer(x)
    how = the_map(layer)
    if fast:
        y = add_mapped(y, x, how, make_plan(own, units), bias)
    else:
        y = reference.add_mapped(y, x, how, own, units, bias)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    leaves = {f"A{i}": s.A_RI.grad for i, s in enumerate(own)} | {f"B{i}": s.B_RO.grad for i, s in enumerate(own)}
    leaves |= {name: leaf.grad for name, leaf in magnitudes.items()}
    leaves |= {} if bias is None else {"bias": bias.grad}
    return y.detach(), {"x": x.grad, **leaves}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_fast_path_is_the_definition(name: str, rows: str, dropout: float, decomposed: bool) -> None:
    given = case(name, rows, weighted=rows == "mixtures", dropout=dropout, decomposed=decomposed)
    (y, found), (expected_y, expected) = (run(*given, fast=fast) for fast in (True, False))
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)
    for key, wanted in expected.items():
        mine = found[key]
        assert mine is not None or wanted is None or not wanted.any(), key
        if mine is not None and wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4, msg=lambda said, key=key: f"{key}: {said}")
    assert any(key.startswith("magnitude") for key in found) == decomposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [Outputs(1, 3, 5), Outputs(1, 2, 4)], ids=["in one piece", "in turn"])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_of_some_outputs(rows: str, outputs: Outputs, dtype: torch.dtype) -> None:
    """Beside one of all outputs, decomposed and not; the others' numbers aren't written."""
    name = "linear" if outputs.period == 5 else "wide"
    layer, x, segments, units = case(name, rows, weighted=rows == "mixtures", dropout=0.4, decomposed=True)
    layer, x, parts = layer.to(dtype), x.to(dtype), list[Segment]()
    for i, segment in enumerate(segments):
        B, part = outputs.of(segment.B_RO).flatten(-2), segment.decomposition
        if part is not None:
            norms = output_norms(outputs.rows_of(layer.get_parameter("weight")), segment.A_RI, B, segment.scaling)
            part = Decomposition(magnitude_O=norms * (1 + 0.5 * torch.randn(len(norms))), norm_O=norms)
        parts.append(replace(segment, B_RO=B, decomposition=part, outputs=outputs) if i != 1 else segment)
    (y, found), (expected_y, expected) = (run(layer, x, parts, units, fast=fast) for fast in (True, False))
    exact = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(y, expected_y, **exact)
    assert expected.keys() >= {"x", "bias", "magnitude0"}
    for key, wanted in expected.items():
        mine = found[key]
        assert mine is not None or wanted is None or not wanted.any(), key
        if mine is not None and wanted is not None:
            torch.testing.assert_close(mine, wanted, **exact, msg=lambda said, key=key: f"{key}: {said}")
    alone, _ = run(layer, x, parts[:1], units, fast=True)
    changed = torch.zeros(y.shape[-1], dtype=torch.bool)
    outputs.of(changed).fill_(True)
    assert torch.equal(alone[..., ~changed], layer(x).detach()[..., ~changed])
    assert not torch.equal(alone[..., changed], layer(x).detach()[..., changed])


@pytest.mark.parametrize("name", LAYERS)
def test_a_decomposed_layer_is_a_change_of_the_weight(name: str) -> None:
    """magnitude · V / ‖V‖ for each output, V = W + scaling · B A (DoRA, eq. 5)."""
    layer, x, (segment,), units = case(name, "one slot for everything", decomposed=True)
    y, _ = run(layer, x, [segment], units, fast=True)
    weight, how, parts = layer.get_parameter("weight"), the_map(layer), segment.decomposition
    assert parts is not None
    whole = how.flat(weight) + segment.scaling * segment.B_RO.t() @ segment.A_RI
    torch.testing.assert_close(parts.norm_O, whole.norm(dim=1))
    weight.copy_(how.shape(parts.magnitude_O[:, None] * whole / whole.norm(dim=1)[:, None]))
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_the_definition_is_a_change_of_the_weight(name: str) -> None:
    """W + scaling · B A in the layer itself."""
    layer, x, (segment,), units = case(name, "one slot for everything")
    y, _ = run(layer, x, [segment], units, fast=False)
    weight, how = layer.get_parameter("weight"), the_map(layer)
    before = weight.clone()
    assert torch.equal(how.shape(how.flat(before)), before)
    torch.testing.assert_close(how.whole(x, how.flat(before)), layer(x) - _bias(layer))
    weight += how.shape(segment.scaling * segment.B_RO.t() @ segment.A_RI)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def _bias(layer: nn.Module) -> Tensor:
    bias = layer._parameters.get("bias")
    return torch.zeros(()) if bias is None else bias.view(-1, *(1,) * (layer.get_parameter("weight").ndim - 2))


@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_is_an_input_of_the_layer(name: str) -> None:
    layer, _, (segment,), _ = case(name, "one slot for everything")
    x = the_map(layer).sample(segment.A_RI.shape[1], torch.Generator().manual_seed(0))
    assert layer(x).numel() > 1


@pytest.mark.parametrize("name", ["2-D", "embedding", "depthwise"])
def test_rows_without_a_slot_are_the_bases_bit_for_bit(name: str) -> None:
    layer, x, segments, units = case(name, "rows of two slots, others left")
    layer = layer.bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    y, found = run(layer, x, segments, units, fast=True)
    assert torch.equal(y[3], layer(x)[3])
    assert not torch.equal(y[0], layer(x)[0])
    assert y.dtype == torch.bfloat16
    assert found["A0"] is not None
    assert found["A0"].dtype == torch.float32


def test_a_value_that_is_not_finite_stays_in_its_rows() -> None:
    layer, x, segments, units = case("in groups", "rows of two slots, others left")
    clean, _ = run(layer, x, segments, units, fast=True)
    segments[0].A_RI[0, 0] = torch.nan
    y, found = run(layer, x, segments, units, fast=True)
    assert y[:2].isnan().any()
    assert torch.equal(y[2:], clean[2:])
    assert found["A1"] is not None
    assert found["A1"].isfinite().all()


def test_another_route_in_backward_is_an_error() -> None:
    layer, x, segments, units = case("2-D", "one slot for everything")
    own = [replace(s, A_RI=s.A_RI.clone().requires_grad_()) for s in segments]
    plan = replace(make_plan(own, units), structure_now=lambda: 1)
    y = add_mapped(layer(x), x, the_map(layer), plan)
    with pytest.raises(RoutingError, match="adapters were added or removed between"):
        y.sum().backward()


def test_an_id_of_padding_is_not_trained() -> None:
    layer, x, segments, units = case("embedding with padding", "one slot for everything")
    x[0, 0, 0] = 2
    _, found = run(layer, x, segments, units, fast=True)
    assert found["A0"] is not None
    assert not found["A0"][:, 2].any()
    assert found["A0"].any()


def test_the_bias_is_no_part_of_what_is_decomposed() -> None:
    layer, x, segments, units = case("linear", "mixtures", weighted=True, decomposed=True)
    _, found = run(layer, x, segments, units, fast=True)
    dy = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(1))
    assert found["bias"] is not None
    torch.testing.assert_close(found["bias"], dy.flatten(0, -2).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4])
def test_norms_where_little_of_the_weight_is_left(left: float, turned: bool) -> None:
    """B A undoes the weight but for a part of that size. In every number of pieces, of outputs and of inputs (`turned`)."""
    torch.manual_seed(0)
    u, v, rest = torch.randn(50, 1), torch.randn(1, 40), torch.randn(50, 40)
    weight, A, B = u @ v + left * rest, v, -u.t() / 2
    weight = weight.t().contiguous().t() if turned else weight
    exact = (weight.double() + 2.0 * B.t().double() @ A.double()).norm(dim=1).float()
    found = output_norms(weight, A, B, 2.0)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output_norms(weight, A, B, 2.0), found)
    assert bool((output_norms(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 3), 1.0) > 0).all())
