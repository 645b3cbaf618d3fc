"""4-bit storage: the plain twins against their bound, and bitsandbytes against the twins, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabank.kernels import four_bit

SHAPES = [(96, 64), (32, 32), (7, 10), (3, 6), (2, 4096), (64, 1)]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def doubly_quantised(w: Tensor, quant_type: str) -> list[Tensor]:
    """A base whose factors are in 8 bits, as bitsandbytes makes it."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes isn't installed")
    packed, state = functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
    inner = state.state2
    assert state.nested and inner.blocksize == four_bit.FACTORS
    return [packed, state.absmax, inner.absmax, inner.code, state.offset]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_to_the_nearest_code_of_its_block(shape: tuple[int, int], quant_type: str) -> None:
    w = weight(shape)
    packed, absmax = base = four_bit.quantize(w, quant_type)
    assert packed.dtype == torch.uint8 and packed.shape == (w.numel() // 2, 1) and absmax.shape == (-(-w.numel() // 64),)
    back = four_bit.dequantize_plain(base, quant_type, shape, torch.float32)
    scale = absmax.repeat_interleave(64)[: w.numel()]
    codes = torch.tensor(four_bit.CODES[quant_type])
    distances = (w.reshape(-1, 1) - codes * scale[:, None]).abs()
    torch.testing.assert_close((back - w).abs().reshape(-1), distances.amin(1))


def test_zeros_stay_zeros() -> None:
    base = four_bit.quantize(torch.zeros(8, 16))
    assert not four_bit.dequantize_plain(base, "nf4", (8, 16), torch.float32).any()


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_the_block_size_follows_from_the_number_of_blocks(block: int) -> None:
    for numbers in (block // 2, block, block + 2, 2 * block, 2 * block + 2, 3 * block - 2, 7 * block + 6, 4096 * 14336):
        blocks = -(-numbers // block)
        found = four_bit.block_size(numbers, blocks)
        assert found == block or (blocks == 1 and found >= numbers)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_does_the_same(shape: tuple[int, int], quant_type: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes isn't installed")
    w = weight(shape)
    packed, state = functional.quantize_4bit(w, quant_type=quant_type)
    assert torch.equal(packed, four_bit.quantize(w, quant_type)[0])
    base = [packed, state.absmax]
    for dtype in (torch.float32, torch.bfloat16):
        plain = four_bit.dequantize_plain(base, quant_type, shape, dtype)
        for partial in (shape, (shape[0], -1), (-1, shape[1])):
            assert torch.equal(four_bit.dequantize(base, quant_type, partial, dtype), plain)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 257)])
def test_factors_in_8_bits(shape: tuple[int, int], quant_type: str) -> None:
    w = weight(shape)
    base = doubly_quantised(w, quant_type)
    assert base[1].dtype == torch.uint8 and base[2].shape == (-(-base[1].numel() // four_bit.FACTORS),)
    plain = four_bit.dequantize_plain(base, quant_type, shape, torch.float32)
    for partial in (shape, (shape[0], -1), (-1, shape[1])):
        torch.testing.assert_close(four_bit.dequantize(base, quant_type, partial, torch.float32), plain, rtol=1e-6, atol=1e-7)
    once = four_bit.dequantize_plain(four_bit.quantize(w, quant_type), quant_type, shape, torch.float32)
    assert (plain - once).norm() <= 0.02 * once.norm()  # of factors in 8 bits


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_products_are_those_of_the_dequantised_weight(quant_type: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    from lorabank.kernels.base import FAST_PRODUCTS

    base = four_bit.quantize(weight((96, 64)), quant_type)
    w = four_bit.dequantize_plain(base, quant_type, (96, 64), torch.float32)
    x, dy, bias = torch.randn(2, 5, 64), torch.randn(2, 5, 96), torch.randn(96)
    product = FAST_PRODUCTS[quant_type]
    torch.testing.assert_close(product.forward(x, base, bias), x @ w.t() + bias)
    torch.testing.assert_close(product.input_grad(dy, base), dy @ w)
