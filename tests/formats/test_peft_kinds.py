"""PEFT's files of convolutions and embeddings, both ways: the same outputs in PEFT and here."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorabank import Adapter, AdapterConfig, attach
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from tests.bank.tiny import VOCABULARY, add, ids, llama, outputs, state_bytes


class Convolutions(nn.Module):
    """What PEFT runs as we do: it takes zeros for padding and no dilation, whatever the layer has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.along = nn.Conv1d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, (1, 3), padding=(0, 1), groups=2, bias=False)
        self.depthwise = nn.Conv2d(12, 12, (2, 3), padding=1, groups=12)
        self.strided = nn.Conv2d(12, 6, 1, stride=(2, 1))
        self.deep = nn.Conv3d(6, 4, (1, 1, 2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.along(self.embed(x).mT).unflatten(2, (2, -1))
        for layer in (self.grouped, self.depthwise, self.strided):
            h = torch.tanh(layer(h))
        return self.head(self.deep(h[:, :, None]).flatten(2).mT.contiguous())


ALL = ["embed", "along", "grouped", "depthwise", "strided", "deep", "head"]
PLAIN = [name for name in ALL if name not in ("grouped", "depthwise")]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        yield


def test_ours_in_peft(tmp_path: Path) -> None:
    model = Convolutions().eval()
    bank = attach(model)
    add(bank, "a", targets=ALL, rank_pattern={"along": 2, "grouped": 4}, alpha_pattern={"strided": 3})
    x = ids(3)
    expected = model(x).detach()
    bank.adapter("a").save(tmp_path)
    base = Convolutions().eval()
    plain = base(x).detach()
    assert not torch.allclose(plain, expected, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_save_load_save_gives_the_same_bytes(tmp_path: Path) -> None:
    bank = attach(Convolutions())
    add(bank, "a", targets=ALL)
    bank.adapter("a").save(tmp_path / "one")
    loaded = Adapter.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for path, layer in bank.adapter("a").layers.items():
        found = loaded.layers[path]
        assert (found.groups, found.looks_up, found.scaling) == (layer.groups, layer.looks_up, layer.scaling)
        assert torch.equal(found.A, layer.A)
        assert torch.equal(found.B, layer.B)


def test_pefts_here(tmp_path: Path) -> None:
    base = Convolutions().eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=PLAIN, init_lora_weights=False)).eval()
    x = ids(3)
    expected = theirs(x).detach()
    theirs.save_pretrained(str(tmp_path))
    adapter = Adapter.load(tmp_path)
    assert set(adapter.layers) == set(PLAIN)
    model = Convolutions().eval()
    bank = attach(model)
    bank.load("a", adapter)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_pefts_a_keeps_apart_are_ours(tmp_path: Path) -> None:
    """Each group with an A of its own, which takes a rank as many times as large."""
    base = Convolutions().eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["grouped"], init_lora_weights=False)).eval()
    A = next(p for name, p in theirs.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        A[:2, 4:] = 0
        A[2:, :4] = 0
    x = ids(3)
    expected = theirs(x).detach()
    theirs.save_pretrained(str(tmp_path))
    adapter = Adapter.load(tmp_path)
    assert adapter.layers["grouped"].A.shape == (4, 4, 1, 3)
    model = Convolutions().eval()
    bank = attach(model)
    bank.load("a", adapter)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_pefts_a_mixes_are_refused(tmp_path: Path) -> None:
    base = Convolutions()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["grouped"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="'grouped' is a convolution in 2 groups, and its A reaches from one"):
        Adapter.load(tmp_path)


# ---- an embedding that PEFT saves along -----------------------------------------------------------------------------------


def tied_off(**sizes: Any) -> nn.Module:
    torch.manual_seed(3)
    return llama(tie_word_embeddings=False, **sizes).eval()


@pytest.fixture
def with_embeddings(tmp_path: Path) -> tuple[Path, Tensor]:
    """(folder that PEFT wrote, what its model gives)."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(tied_off(), config).eval()  # pyright: ignore[reportArgumentType]
    theirs.save_pretrained(str(tmp_path / "theirs"))
    return tmp_path / "theirs", theirs(input_ids=ids(2)).logits.detach()


def test_a_file_with_the_bases_embeddings_loads_and_saves_them_again(
    with_embeddings: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder, expected = with_embeddings
    adapter = Adapter.load(folder)
    assert sorted(adapter.base_weights) == ["lm_head", "model.embed_tokens"]
    model = tied_off()
    before = state_bytes(model)
    bank = attach(model)
    bank.load("a", adapter)
    torch.testing.assert_close(outputs(model, ids(2)).detach(), expected, rtol=1e-4, atol=1e-5)
    assert state_bytes(model) == before
    adapter.save(tmp_path / "again")
    theirs, again = (load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / "again"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(theirs[key], again[key]) for key in theirs)
    half = attach(tied_off().bfloat16())
    half.load("a", adapter, force=True)


def test_embeddings_of_another_base_are_refused(with_embeddings: tuple[Path, Tensor]) -> None:
    adapter = Adapter.load(with_embeddings[0])
    trained = {path: weight + (path == "lm_head") for path, weight in adapter.base_weights.items()}
    bank = attach(tied_off())
    with pytest.raises(AdapterFileError, match="lm_head: the file brings the base's own weight, and this model has ano"):
        bank.load("a", replace(adapter, base_weights=trained))
    longer = {path: torch.cat([weight, weight[:1]]) for path, weight in adapter.base_weights.items()}
    with pytest.raises(AdapterFileError, match=r"the base's own weight, \(49, 16\), and this model's is \(48, 16\): resize"):
        bank.load("a", replace(adapter, base_weights=longer))
    assert bank.names == ()


def test_a_base_weight_without_an_adapter_is_no_lora_tensor(with_embeddings: tuple[Path, Tensor]) -> None:
    file = with_embeddings[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.norm.base_layer.weight": torch.ones(16)}, file)
    with pytest.raises(AdapterFileError, match=r"model\.norm\.base_layer\.weight' is a module saved in full"):
        Adapter.load(with_embeddings[0])


# ---- what doesn't fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "layer", "said"),
    [
        (
            "head",
            AdapterLayer(torch.ones(1, 4, 1), torch.ones(5, 1), 1.0),
            "made for a convolution, .* is a Linear",
        ),
        ("along", AdapterLayer(torch.ones(1, 36), torch.ones(8, 1), 1.0), "made for a linear layer, .* is a Conv1d"),
        ("embed", AdapterLayer(torch.ones(1, 48), torch.ones(12, 1), 1.0), "made for a linear layer, .* is a Embedding"),
        ("along", AdapterLayer(torch.ones(1, 4, 9), torch.ones(8, 1), 1.0), "made for a kernel of 9, the model's layer has 3"),
        (
            "grouped",
            AdapterLayer(torch.ones(1, 4, 1, 3), torch.ones(12, 1), 1.0),
            "made for a kernel of 1 × 3, the model's layer has 1 × 3 in 2 groups",
        ),
    ],
)
def test_a_layer_of_another_kind_is_named(path: str, layer: AdapterLayer, said: str) -> None:
    bank = attach(Convolutions())
    with pytest.raises(AdapterFileError, match=f"{path}: {said}"):
        bank.load("a", Adapter(config=AdapterConfig(rank=1, targets=[path]), layers={path: layer}))
