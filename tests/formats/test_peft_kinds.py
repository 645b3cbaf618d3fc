"""PEFT's files of convolutions and embeddings, both ways: the same outputs in PEFT and here."""

from __future__ import annotations

import copy
import json
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
from tests.bank.tiny import VOCABULARY, add, gpt2, ids, llama, outputs, state_bytes


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


# ---- DoRA ------------------------------------------------------------------------------------------------------------------


def decomposed(kind: str) -> tuple[nn.Module, list[str]]:
    """(a model, what is adapted in it)."""
    torch.manual_seed(2)
    if kind == "convolutions":
        return Convolutions().eval(), ["embed", "along", "strided", "deep", "head"]
    if kind == "llama":
        return llama().eval(), ["q_proj", "down_proj", "embed_tokens"]
    return gpt2().eval(), ["c_attn", "c_proj", "wpe"]


def answer(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return (out if isinstance(out, Tensor) else out.logits).detach()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convolutions"])
def test_dora_both_ways(kind: str, tmp_path: Path) -> None:
    base, targets = decomposed(kind)
    turned = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=True, init_lora_weights=False, **turned)
    theirs = peft.get_peft_model(base, config).eval()  # pyright: ignore[reportArgumentType]
    x = ids(2)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = answer(theirs, x)
    adapter = Adapter.load(tmp_path / "theirs")
    assert adapter.config.use_dora
    assert all(layer.magnitude is not None for layer in adapter.layers.values())
    model, _ = decomposed(kind)
    bank = attach(model)
    bank.load("a", adapter)
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-3, atol=1e-4)
    bank.adapter("a").save(tmp_path / "ours")
    fresh, _ = decomposed(kind)
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(answer(again, x), expected, rtol=1e-3, atol=1e-4)
    written, given = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    added = {key: value.shape for key, value in given.items() if ".base_layer." not in key}  # an embedding's own weight
    assert {key: value.shape for key, value in written.items()} == added
    Adapter.load(tmp_path / "ours").save(tmp_path / "once more")
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "once more" / file).read_bytes()


@pytest.mark.parametrize("change", ["dropped", "too many", "unasked", "twice", "whole numbers"])
def test_magnitudes_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    bank = attach(llama())
    add(bank, "a", targets=["q"], use_dora=change != "unasked")
    bank.adapter("a").save(tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = load_file(file)
    if change == "dropped":
        del tensors[key]
    elif change == "twice":
        tensors[f"{key}.other.weight"] = tensors[key].clone()
    elif change == "whole numbers":
        tensors[key] = tensors[key].to(torch.int32)
    else:
        tensors[key] = torch.ones(17)
    save_file(tensors, file)
    (tmp_path / "lorabank.json").unlink()
    said = {
        "dropped": "'model.layers.0.self_attn.q_proj' has no lora_magnitude_vector .*use_dora: true",
        "too many": "has 17 magnitudes for 16 outputs",
        "twice": "is a second magnitude of 'model.layers.0.self_attn.q_proj': two adapters in a file",
        "whole numbers": "lora_magnitude_vector' is torch.int32",
        "unasked": "has a lora_magnitude_vector .*use_dora: false",
    }
    with pytest.raises(AdapterFileError, match=said[change]):
        Adapter.load(tmp_path)


def test_an_embedding_without_magnitudes_beside_decomposed_layers_is_refused_both_ways(tmp_path: Path) -> None:
    bank = attach(llama())
    add(bank, "a", targets=["q", "embed_tokens"], use_dora=True)
    adapter = bank.adapter("a")
    plain = replace(adapter.layers["model.embed_tokens"], magnitude=None)
    with pytest.raises(AdapterFileError, match=r"'model.embed_tokens'.* other layers are decomposed \(DoRA\) and it isn't"):
        replace(adapter, layers={**adapter.layers, "model.embed_tokens": plain}).save(tmp_path / "bad")
    adapter.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.embed_tokens.lora_magnitude_vector"]
    save_file(tensors, file)
    (tmp_path / "a" / "lorabank.json").unlink()
    with pytest.raises(AdapterFileError, match=r"'model.embed_tokens' has no lora_magnitude_vector .*use_dora: true"):
        Adapter.load(tmp_path / "a")


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
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        halved = attach(tied_off().to(dtypes[0]))  # rounded once there and once here, and in other places
        halved.load("a", replace(adapter, base_weights={k: v.to(dtypes[1]) for k, v in adapter.base_weights.items()}))


def test_embeddings_of_another_base_are_refused(with_embeddings: tuple[Path, Tensor]) -> None:
    adapter = Adapter.load(with_embeddings[0])
    trained = {path: weight + (path == "lm_head") for path, weight in adapter.base_weights.items()}
    bank = attach(tied_off())
    with pytest.raises(AdapterFileError, match="lm_head: the file brings the base's own weight, and this model has ano"):
        bank.load("a", replace(adapter, base_weights=trained))
    attach(tied_off()).load("a", replace(adapter, base_weights=trained), force=True)
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


def test_a_base_weight_of_another_dtype_is_named(with_embeddings: tuple[Path, Tensor]) -> None:
    file = with_embeddings[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(AdapterFileError, match=rf"'{name}' is torch.int8"):
        Adapter.load(with_embeddings[0])


def test_a_depthwise_convolution_that_would_grow_in_pefts_form_is_saved_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1100, 1100, 4, groups=1100), nn.Conv1d(1100, 8, 1))
    bank = attach(model)
    add(bank, "a", rank=4, targets="all-conv")
    with pytest.warns(UserWarning, match=r"convolutions in groups, whose A would take \d+ MiB .* which PEFT can't read"):
        bank.adapter("a").save(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 2**18
    loaded = Adapter.load(tmp_path / "a")
    for path, layer in bank.adapter("a").layers.items():
        mine = loaded.layers[path]
        assert (mine.groups, mine.scaling) == (layer.groups, layer.scaling)
        assert torch.equal(mine.A, layer.A) and torch.equal(mine.B, layer.B)
    bank.load("b", loaded)
    x = torch.randn(2, 1100, 6)
    with bank.route("a"):
        expected = model(x)
    with bank.route("b"):
        assert torch.equal(model(x), expected)
    loaded.save(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        peft.PeftModel.from_pretrained(copy.deepcopy(bank.detach()), tmp_path / "a")
    (tmp_path / "a" / "lorabank.json").unlink()
    with pytest.raises(AdapterFileError, match="doesn't fit this model"):
        attach(model).load("c", Adapter.load(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:.*are convolutions in groups, whose A would take")
def test_numbers_of_groups_that_arent_the_adapters_are_refused(tmp_path: Path) -> None:
    bank = attach(nn.Sequential(nn.Conv1d(1100, 1100, 4, groups=1100)))
    add(bank, "a", rank=4, targets="all-conv")
    bank.adapter("a").save(tmp_path)
    own = json.loads((tmp_path / "lorabank.json").read_text())
    for groups in ({"0": 7}, {"1": 1100}, [1100]):
        (tmp_path / "lorabank.json").write_text(json.dumps({**own, "groups": groups}))
        with pytest.raises(AdapterFileError, match=r"lorabank\.json: its numbers of groups aren't this adapter's"):
            Adapter.load(tmp_path)


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
