"""LyCORIS' forms read as LoRA: their ΔW by the papers' formulas, in full and by a smaller rank with its error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lorabank.errors import AdapterFileError
from lorabank.formats.kohya import load_kohya, read_kohya, save_kohya

CONV = "lora_unet_mid_block_resnets_0_conv1"
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV_PATH = "unet.mid_block.resnets.0.conv1"
LINEAR_PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def write(path: Path, name: str, tensors: dict[str, Tensor], alpha: float | None = None) -> Path:
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    save_file({f"{name}.{key}": value.contiguous() for key, value in {**tensors, **more}.items()}, path)
    return path


def loha(out: int, width: int, rank: int) -> dict[str, Tensor]:
    return {
        "hada_w1_a": rand(out, rank),
        "hada_w1_b": rand(rank, width),
        "hada_w2_a": rand(out, rank) + 1,
        "hada_w2_b": rand(rank, width) - 1,
    }


def close(layer_delta: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(layer_delta.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_tucker_is_the_chain_of_three_convolutions(tmp_path: Path) -> None:
    tensors = {"lora_down.weight": rand(3, 8, 1, 1), "lora_mid.weight": rand(3, 3, 3, 3), "lora_up.weight": rand(6, 3, 1, 1)}
    layer = load_kohya(write(tmp_path / "a.safetensors", CONV, tensors, alpha=6.0)).layers[CONV_PATH]
    x = rand(2, 8, 5, 5)
    down, mid, up = tensors.values()
    chain = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up) * 2.0
    torch.testing.assert_close(F.conv2d(x, layer.delta(), padding=1), chain, rtol=0, atol=1e-4)
    assert layer.rank == 3


@pytest.mark.filterwarnings("ignore:.* became LoRA:UserWarning")
@pytest.mark.parametrize(("out", "width", "rank"), [(20, 24, 2), (6, 8, 3)], ids=["factors", "whole"])
def test_loha_in_full(out: int, width: int, rank: int, tmp_path: Path) -> None:
    tensors = loha(out, width, rank)
    layer = load_kohya(write(tmp_path / "a.safetensors", LINEAR, tensors, alpha=1.0)).layers[LINEAR_PATH]
    w1a, w1b, w2a, w2b = (value.double() for value in tensors.values())
    close(layer.delta(), (w1a @ w1b) * (w2a @ w2b) / rank)
    assert layer.rank == min(rank**2, out)


@pytest.mark.filterwarnings("ignore:.* became LoRA:UserWarning")
def test_loha_of_a_convolution_flat_and_with_cores(tmp_path: Path) -> None:
    tensors = loha(6, 8 * 9, 2)
    layer = load_kohya(write(tmp_path / "a.safetensors", CONV, tensors, alpha=2.0)).layers[CONV_PATH]
    w1a, w1b, w2a, w2b = (value.double() for value in tensors.values())
    close(layer.delta(), ((w1a @ w1b) * (w2a @ w2b)).view(6, 8, 3, 3))

    cores = {name: rand(2, 2, 3, 3) + number for number, name in enumerate(("hada_t1", "hada_t2"))}
    halves = {f"hada_w{side}_{role}": rand(2, size) + int(side) for side in "12" for role, size in (("a", 6), ("b", 8))}
    layer = load_kohya(write(tmp_path / "a.safetensors", CONV, {**halves, **cores})).layers[CONV_PATH]
    expected = torch.ones(6, 8, 3, 3, dtype=torch.float64)
    for side in "12":
        a, b, t = (value.double() for value in (halves[f"hada_w{side}_a"], halves[f"hada_w{side}_b"], cores[f"hada_t{side}"]))
        expected *= torch.einsum("ijkl,io,jn->onkl", t, a, b)
    close(layer.delta(), expected)


LOKR: dict[str, tuple[dict[str, Tensor], float | None]] = {
    "both whole": ({"lokr_w1": rand(2, 3), "lokr_w2": rand(4, 5)}, None),
    "second factored": ({"lokr_w1": rand(2, 3), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 5)}, 0.5),
    "both factored": (
        {"lokr_w1_a": rand(3, 2), "lokr_w1_b": rand(2, 3), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 5)},
        0.5,
    ),
    "first factored": ({"lokr_w1_a": rand(3, 2), "lokr_w1_b": rand(2, 3), "lokr_w2": rand(4, 5)}, 0.5),
}


@pytest.mark.filterwarnings("ignore:.* became LoRA:UserWarning")
@pytest.mark.parametrize(("tensors", "scaling"), LOKR.values(), ids=LOKR.keys())
def test_lokr_in_full(tensors: dict[str, Tensor], scaling: float | None, tmp_path: Path) -> None:
    """Both factors whole have no scaling, whatever alpha says."""
    layer = load_kohya(write(tmp_path / "a.safetensors", LINEAR, tensors, alpha=1.0)).layers[LINEAR_PATH]
    get = {key: value.double() for key, value in tensors.items()}
    first = get["lokr_w1"] if "lokr_w1" in get else get["lokr_w1_a"] @ get["lokr_w1_b"]
    second = get["lokr_w2"] if "lokr_w2" in get else get["lokr_w2_a"] @ get["lokr_w2_b"]
    close(layer.delta(), torch.kron(first, second) * (scaling or 1.0))
    assert layer.rank == int(torch.linalg.matrix_rank(first)) * int(torch.linalg.matrix_rank(second))


@pytest.mark.filterwarnings("ignore:.* became LoRA:UserWarning")
@pytest.mark.parametrize("form", ["whole", "flat", "core"])
def test_lokr_of_a_convolution(form: str, tmp_path: Path) -> None:
    first = rand(2, 4)
    if form == "whole":
        tensors, second = {"lokr_w2": rand(3, 2, 3, 3)}, rand(3, 2, 3, 3).double()
    elif form == "flat":
        tensors = {"lokr_w2_a": rand(3, 2), "lokr_w2_b": rand(2, 2 * 9)}
        second = (tensors["lokr_w2_a"].double() @ tensors["lokr_w2_b"].double()).view(3, 2, 3, 3)
    else:
        tensors = {"lokr_w2_a": rand(2, 3), "lokr_w2_b": rand(2, 2), "lokr_t2": rand(2, 2, 3, 3)}
        a, b, t = (value.double() for value in tensors.values())
        second = torch.einsum("ijkl,io,jn->onkl", t, a, b).contiguous()
    layer = load_kohya(write(tmp_path / "a.safetensors", CONV, {"lokr_w1": first, **tensors})).layers[CONV_PATH]
    close(layer.delta(), torch.kron(first.double()[:, :, None, None], second))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_a_smaller_rank_loses_what_is_said(kind: str, tmp_path: Path) -> None:
    """The best of its rank: the error is that of the ΔW's own singular values (Eckart and Young)."""
    tensors = loha(20, 24, 3) if kind == "LoHa" else {"lokr_w1": rand(4, 4), "lokr_w2": rand(5, 6)}
    path = write(tmp_path / "a.safetensors", LINEAR, tensors)
    found = read_kohya(path, rank=4)
    how = found.decomposed[LINEAR_PATH]
    delta = found.adapter.layers[LINEAR_PATH].delta().double()
    if kind == "LoHa":
        w1a, w1b, w2a, w2b = (value.double() for value in tensors.values())
        whole = (w1a @ w1b) * (w2a @ w2b)
    else:
        whole = torch.kron(tensors["lokr_w1"].double(), tensors["lokr_w2"].double())
    values = torch.linalg.svdvals(whole)
    assert (how.kind, how.rank) == (kind, 4) and how.full_rank == int(torch.linalg.matrix_rank(whole))
    assert float((whole - delta).norm() / whole.norm()) == pytest.approx(how.error, rel=1e-4)
    assert how.error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-6)
    assert how.error > 0.01


def test_a_change_of_zero(tmp_path: Path) -> None:
    tensors = {"lokr_w1": rand(2, 2), "lokr_w2": torch.zeros(3, 3)}
    found = read_kohya(write(tmp_path / "a.safetensors", LINEAR, tensors))
    assert not found.adapter.layers[LINEAR_PATH].delta().any()
    assert found.decomposed[LINEAR_PATH].error == 0


def test_it_is_said_and_written_as_lora(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", LINEAR, {**loha(20, 24, 2), "dora_scale": torch.ones(20, 1)})
    with pytest.warns(UserWarning, match=r"1 LoHa layer became LoRA of rank 4 to 4 \(relative error .*--rank"):
        adapter = load_kohya(path)
    assert adapter.config.use_dora
    again = load_kohya(save_kohya(adapter, tmp_path / "b.safetensors"))
    assert torch.equal(again.layers[LINEAR_PATH].delta(), adapter.layers[LINEAR_PATH].delta())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({key: value for key, value in loha(6, 8, 2).items() if key != "hada_w2_b"}, "lacks hada_w2_b"),
        ({"lokr_w1": rand(2, 2)}, "lacks lokr_w2"),
        ({"lokr_w1": rand(2, 2), "lokr_w2": rand(2, 2), "hada_w1_a": rand(2, 2)}, "lacks hada_"),
        ({**loha(6, 8, 2), "hada_w2_b": rand(3, 8)}, "tensors that don't fit each other: hada_w1_a"),
        ({**loha(6, 8, 2), "hada_w2_b": rand(2, 9)}, "tensors that don't fit each other"),
        ({"lokr_w1": rand(2, 2), "lokr_w2_a": rand(2, 3), "lokr_w2_b": rand(2, 4)}, "tensors that don't fit each other"),
        ({**loha(6, 8, 2), "lora_up.weight": rand(6, 2)}, "two adapters in one file"),
        (
            {"lora_down.weight": rand(2, 8, 1, 1), "lora_mid.weight": rand(3, 2, 3, 3), "lora_up.weight": rand(6, 2, 1, 1)},
            "don't fit",
        ),
        (
            {"lora_down.weight": rand(2, 8), "lora_up.weight": rand(6, 2), "dora_scale": torch.tensor(1.0)},
            r"dora_scale' \(\) should be one number for each of 6 outputs\. Fetch the file again",
        ),
        ({"lora_down.weight": torch.tensor(1.0), "lora_up.weight": rand(6, 2)}, r"lora_down \(\), lora_up \(6, 2\)\. Fetch"),
        ({"lora_down.weight": rand(2, 8), "lora_up.weight": rand(0, 2)}, r"isn't A .* lora_up \(0, 2\)\. Fetch the file again"),
    ],
    ids=[
        "half",
        "one factor",
        "two kinds",
        "ranks",
        "widths",
        "inner",
        "LoRA too",
        "tucker",
        "one magnitude",
        "a number",
        "no outputs",
    ],
)
def test_broken_layers_are_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=message):
        load_kohya(write(tmp_path / "a.safetensors", LINEAR, tensors))


def test_a_kernel_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="a convolution of 3 × 3, and its 71 numbers"):
        load_kohya(write(tmp_path / "a.safetensors", CONV, loha(6, 71, 2)))


def test_a_number_where_the_width_of_text_is_looked_up(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_down.weight": torch.tensor(1.0), "lora_up.weight": rand(6, 2)}
    with pytest.raises(AdapterFileError, match=rf"layer '{name}' isn't A .*lora_down \(\)"):
        load_kohya(write(tmp_path / "a.safetensors", name, tensors))
