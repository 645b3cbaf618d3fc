"""Adapter folders that are broken, altered or of a kind that isn't supported: a clear error, and nothing dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.peft import load_peft

PATH = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{PATH}.lora_"


@pytest.fixture
def folder(plain_adapter: Adapter, tmp_path: Path) -> Path:
    """An adapter folder as PEFT leaves it: without our own file."""
    path = plain_adapter.save(tmp_path / "adapter")
    (path / "lorabank.json").unlink()
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


UNSUPPORTED_SETTINGS = {
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["score"],
    "trainable_token_indices": [1],
    "target_parameters": ["experts.down_proj"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 4},
    "megatron_config": {"x": 1},
    "bias": "boft_only",
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "LOHA",
}


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_SETTINGS.items(), ids=UNSUPPORTED_SETTINGS.keys())
def test_settings_that_change_the_mathematics_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(AdapterFileError, match=key):
        load_peft(folder)


@pytest.mark.parametrize("init", ["loftq", "olora", "corda", "lora_ga", "pissa", ["x"], "PISSA"])
def test_inits_that_rewrite_the_base_are_refused(folder: Path, init: object) -> None:
    edit_config(folder, init_lora_weights=init)
    with pytest.raises(AdapterFileError, match="rewrites the base"):
        load_peft(folder)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_are_read(folder: Path, init: object) -> None:
    edit_config(folder, init_lora_weights=init)
    assert load_peft(folder).config.init == ("gaussian" if init == "gaussian" else "uniform")


def test_unknown_settings_are_kept_and_noted(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, from_the_future={"a": 1}, unset_in_the_future=None, revision="v2")
    with pytest.warns(UserWarning, match="from_the_future") as caught:
        adapter = load_peft(folder)
    assert "unset_in_the_future" not in str(caught[0].message)
    assert adapter.metadata["peft.from_the_future"] == '{"a": 1}'
    again = load_peft(adapter.save(tmp_path / "again"))
    assert again.metadata == adapter.metadata
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["revision"] == "v2"


BAD_SETTINGS = {
    "r": 0,
    "lora_alpha": "8",
    "lora_dropout": 1.5,
    "rank_pattern": {"q_proj": "4"},
    "alpha_pattern": {"q_(proj": 3},
    "exclude_modules": [""],
}


@pytest.mark.parametrize(("key", "value"), BAD_SETTINGS.items(), ids=BAD_SETTINGS.keys())
def test_settings_out_of_range(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        load_peft(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00"])
def test_a_config_that_is_no_settings(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        load_peft(folder)


def test_a_rank_that_the_config_does_not_know(folder: Path) -> None:
    edit_config(folder, r=8)
    with pytest.raises(AdapterFileError, match=r"rank 4.*says 8"):
        load_peft(folder)


UNSUPPORTED_KEYS = {
    f"{KEY}A.bias": "bias on a LoRA matrix",
    f"base_model.model.{PATH}.lora_magnitude_vector": "use_dora: false",
    "base_model.model.model.embed_tokens.lora_embedding_A": "embedding",
    "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight": "expert",
    f"base_model.model.{PATH}.base_layer.bias": "trained bias",
    "base_model.model.score.weight": "modules_to_save",
    "base_model.model.score.modules_to_save.default.weight": "modules_to_save",
    f"base_model.model.{PATH}.lora_diag": "variant",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": "token embeddings",
    "something": "not a name",
}


@pytest.mark.parametrize(("key", "says"), UNSUPPORTED_KEYS.items())
def test_keys_that_are_not_understood_are_refused_by_name(folder: Path, key: str, says: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(4, 4)}))
    with pytest.raises(AdapterFileError, match=says) as caught:
        load_peft(folder)
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("role", ["A", "B"])
def test_half_a_pair(folder: Path, role: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(f"{KEY}{role}.weight"))
    with pytest.raises(AdapterFileError, match=f"no lora_{role}"):
        load_peft(folder)


BAD_TENSORS = {
    "int8": (torch.ones(4, 32, dtype=torch.int8), "int8"),
    "float8": (torch.ones(4, 32).to(torch.float8_e4m3fn), "float8_e4m3fn; expected float32"),
    "float8 NaN": (torch.full((4, 32), float("nan")).to(torch.float8_e5m2), "holds NaN"),
    "conv": (torch.ones(4, 32, 1, 1), "aren't one convolution's"),
    "vector": (torch.ones(4), "two dimensions"),
    "empty": (torch.ones(0, 32), "two dimensions"),
    "rank": (torch.ones(3, 32), "different ranks"),
    "NaN": (torch.full((4, 32), float("nan")), "NaN or infinity"),
    "infinity": (torch.full((4, 32), float("inf")), "NaN or infinity"),
}


@pytest.mark.parametrize(("value", "says"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_do_not_fit(folder: Path, value: Tensor, says: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{KEY}A.weight": value}))
    with pytest.raises(AdapterFileError, match=says) as caught:
        load_peft(folder)
    assert f"{KEY}A.weight" in str(caught.value)


def test_not_a_number_can_be_looked_at(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[f"{KEY}B.weight"].fill_(float("nan")))
    assert load_peft(folder, allow_non_finite=True).layers[PATH].B.isnan().all()


def renamed(folder: Path, rename: Callable[[str], str]) -> Adapter:
    def change(tensors: dict[str, Tensor]) -> None:
        moved = {rename(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(moved)

    edit_tensors(folder, change)
    return load_peft(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"base_model.model.{name}",
    ],
    ids=["adapter name inside", "no prefix", "prefix twice"],
)
def test_older_forms_of_a_key(folder: Path, plain_adapter: Adapter, rename: Callable[[str], str]) -> None:
    assert set(renamed(folder, rename).layers) == set(plain_adapter.layers)


def test_two_adapters_in_one_file(folder: Path) -> None:
    with pytest.raises(AdapterFileError, match="several adapters"):
        renamed(folder, lambda name: name.replace(".weight", ".one.weight" if PATH in name else ".two.weight"))
    edit_tensors(
        folder, lambda tensors: tensors.update({f"{KEY}A.weight": torch.ones(4, 32), f"{KEY}A.two.weight": torch.ones(4, 32)})
    )
    with pytest.raises(AdapterFileError, match="two adapters"):
        load_peft(folder)


def test_old_files_without_newer_keys(folder: Path, plain_adapter: Adapter) -> None:
    path = folder / "adapter_config.json"
    keep = {"peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "lora_dropout", "bias", "fan_in_fan_out"}
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in keep}))
    adapter = load_peft(folder)
    assert adapter.config.use_rslora is False
    assert {layer.scaling for layer in adapter.layers.values()} == {layer.scaling for layer in plain_adapter.layers.values()}


def test_altered_tensors_are_noticed(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match="altered or damaged"):
        load_peft(folder)


@pytest.mark.parametrize("cut", [3, 200, -7])
def test_truncated_tensors(folder: Path, cut: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(AdapterFileError, match="truncated"):
        load_peft(folder)


def test_no_tensors_at_all(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.clear())
    with pytest.raises(AdapterFileError, match="no tensors"):
        load_peft(folder)


def test_missing_files_and_pickles(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="incomplete"):
        load_peft(folder)
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="pickled"):
        load_peft(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"metadata": None},
        {"config": {"rank": 4, "colour": "red"}},
        {"config": {"rank": 0}},
        {"config": None},
        {"fingerprint": {}},
    ],
)
def test_our_own_file_altered(plain_adapter: Adapter, tmp_path: Path, change: dict[str, object]) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    path = folder / "lorabank.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterFileError):
        load_peft(folder)


def test_a_folder_where_the_settings_should_be(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: can't be read \(Is a directory\)\. Fetch"):
        load_peft(folder)


BEYOND = 10**400
"""A whole number that no float holds, as JSON may have it."""


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lora_alpha", BEYOND, r"lora_alpha should be a number, got 1000"),
        ("lora_dropout", BEYOND, r"dropout: expected a finite number"),
        ("alpha_pattern", {"q_proj": BEYOND}, r"alpha_pattern should map module names to numbers"),
        ("rank_pattern", {"q_proj": BEYOND}, r"rank_pattern should map module names to numbers"),
        ("use_rslora", 1, r"use_rslora should be true or false, got 1"),
        ("use_dora", "no", r'use_dora should be true or false, got "no"'),
        ("lora_bias", 0, r"lora_bias should be true or false, got 0"),
        ("ensure_weight_tying", [], r"ensure_weight_tying should be true or false, got \[\]"),
    ],
)
def test_numbers_that_no_float_holds_and_switches_that_are_none(folder: Path, key: str, value: object, says: str) -> None:
    """PEFT takes `use_rslora: 1` for true; taken for false here it would be another scaling."""
    edit_config(folder, **{key: value})
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json: {says}"):
        load_peft(folder)


@pytest.mark.parametrize("where", ["values", "shape"])
def test_a_fingerprint_with_numbers_that_no_float_holds(plain_adapter: Adapter, tmp_path: Path, where: str) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    path = folder / "lorabank.json"
    data = json.loads(path.read_text())
    next(iter(data["fingerprint"]["tensors"].values()))[where][0] = BEYOND
    path.write_text(json.dumps(data))
    with pytest.raises(AdapterFileError, match="should hold a shape and values"):
        load_peft(folder)


def test_an_own_file_whose_settings_dont_hold_the_adapter(plain_adapter: Adapter, tmp_path: Path) -> None:
    config = replace(plain_adapter.config, bias="all")
    folder = replace(plain_adapter, config=config, biases={"model.norm": torch.ones(32)}).save(tmp_path / "a")
    path = folder / "lorabank.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "config": {**data["config"], "bias": "none"}}))
    with pytest.raises(AdapterFileError, match=r"lorabank\.json: its config isn't this adapter's: of 'model\.norm' its bias was"):
        load_peft(folder)
    path.unlink()
    assert load_peft(folder).biases.keys() == {"model.norm"}


def test_a_change_that_is_far_too_large_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[f"{KEY}B.weight"].fill_(1e8))
    with pytest.warns(UserWarning, match=rf"1 of 6 layers change their weight by more than it is, '{PATH}' by a norm of"):
        assert PATH in load_peft(folder).layers
