"""Frozen products in parts: the same numbers, and parts only where they pay."""

from __future__ import annotations

import pytest
import torch

from lorabank.kernels.gpu import products, rounding


@pytest.mark.parametrize(
    ("tokens", "features", "columns", "expected"),
    [
        (4096, 14336, 4160, 2),  # a block of an 8B model on an H100's 132 multiprocessors
        (8192, 14336, 4224, 4),
        (4096, 4096, 14336, 1),  # not deep
        (2048, 14336, 4160, 1),  # nothing to part
        (4097, 14336, 4160, 1),
        (4096, 14336, 4352, 1),  # 34 columns of 8 tiles would leave most of a third round idle
    ],
)
def test_deep_products_are_started_in_parts(tokens: int, features: int, columns: int, expected: int) -> None:
    assert products.parts(tokens, features, columns, 132) == expected


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_add_up_to_the_product(count: int, onto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "parts", lambda *_: count)
    wide, weight = torch.randn(6, 11), torch.randn(5, 9)
    x, out = wide[:, 3:8], torch.full((6, 20), torch.nan)
    before = torch.randn(6, 9)
    mine = out[:, 4:13]
    mine.copy_(before)
    given = products.multiply(x, weight, mine, onto=onto)
    torch.testing.assert_close(given, x @ weight + (before if onto else 0.0))
    assert given.data_ptr() == mine.data_ptr()
    assert out[:, :4].isnan().all()
    assert out[:, 13:].isnan().all()
    torch.testing.assert_close(products.multiply(x, weight), x @ weight)


@pytest.mark.parametrize("tokens", [1, 35, 64])
def test_every_layers_scales_begin_where_cublas_takes_them(tokens: int) -> None:
    rounded, scales = rounding._empty([torch.empty(tokens, 32)] * 2)
    assert rounded.shape == (2, tokens, 32)
    assert scales.shape == (2, tokens)
    assert all(scale.data_ptr() % 16 == 0 for scale in scales.unbind())
