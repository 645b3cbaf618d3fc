"""Adapter folders of PEFT 0.2 to 0.20, as these versions' own LoraConfig wrote them, and of versions to come."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lorabank.bank.attach import attach
from lorabank.errors import AdapterFileError
from lorabank.formats.peft import load_peft

from .conftest import CONFIGS, adapter_of, llama

ALWAYS: dict[str, Any] = {
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}
OLDEST: dict[str, Any] = {"enable_lora": None, "merge_weights": False}
"""Of 0.2 alone."""
ADDED: dict[str, dict[str, Any]] = {
    "0.2.0": {},
    "0.3.0": {"init_lora_weights": True},
    "0.5.0": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.7.1": {
        "alpha_pattern": {},
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "rank_pattern": {},
    },
    "0.9.0": {"use_dora": False, "use_rslora": False},
    "0.10.0": {"layer_replication": None},
    "0.13.2": {},
    "0.15.2": {
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "lora_bias": False,
        "trainable_token_indices": None,
    },
    "0.17.0": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18.1": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.1"},
    "0.19.1": {"lora_ga_config": None, "use_bdlora": None},
    "0.20.0": {"monteclora_config": None, "velora_config": None},
}
"""Version → the keys that its file has and the one before hasn't; none but 0.2's went. Taken from each version's wheel, run."""
VERSIONS = list(ADDED)
IDS = torch.arange(12)[None] % 64


def written_by(version: str) -> dict[str, Any]:
    keys = dict(ALWAYS)
    for other in VERSIONS[: VERSIONS.index(version) + 1]:
        keys |= ADDED[other]
    return {**keys, **(OLDEST if version == "0.2.0" else {}), **({"peft_version": version} if "peft_version" in keys else {})}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = adapter_of(llama(), ("q_proj", "v_proj"), CONFIGS["plain"])
    path = adapter.save(tmp_path / "adapter")
    (path / "lorabank.json").unlink()
    return path


def configure(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_an_old_version_computes_what_peft_makes_of_it(folder: Path, version: str) -> None:
    configure(folder, written_by(version))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = load_peft(folder)
    bank = attach(llama())
    bank.load("old", adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # PEFT's own, of 0.2's two
        theirs = peft.PeftModel.from_pretrained(llama(), str(folder))
    with torch.no_grad(), bank.route("old"):
        torch.testing.assert_close(bank.model(IDS).logits, theirs(IDS).logits)
        assert not torch.equal(bank.model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("0.2.0", "enable_lora", [True, False, True]),
        ("0.7.1", "megatron_config", {"tensor_model_parallel_size": 2}),
        ("0.10.0", "layer_replication", [[0, 2], [1, 2]]),
        ("0.15.2", "init_lora_weights", "corda"),
        ("0.18.1", "alora_invocation_tokens", [1, 2]),
    ],
)
def test_what_changes_the_mathematics_is_refused(folder: Path, version: str, key: str, value: object) -> None:
    configure(folder, {**written_by(version), key: value})
    with pytest.raises(AdapterFileError, match=key):
        load_peft(folder)


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("0.2.0", "merge_weights", True),
        ("0.5.0", "layers_pattern", "layers"),
        ("0.7.1", "loftq_config", {"loftq_bits": 4}),
        ("0.13.2", "runtime_config", {"ephemeral_gpu_offload": True}),
        ("0.15.2", "eva_config", {"rho": 2.0}),
        ("0.15.2", "corda_config", {"corda_method": "ipm"}),
        ("0.15.2", "exclude_modules", ["lm_head"]),
    ],
)
def test_what_does_not_is_kept(folder: Path, version: str, key: str, value: object) -> None:
    configure(folder, {**written_by(version), key: value})
    adapter = load_peft(folder)  # a warning would be an error
    assert key == "exclude_modules" or json.loads(adapter.metadata[f"peft.{key}"]) == value


def test_the_oldest_files_without_a_scaling_are_refused(folder: Path) -> None:
    configure(folder, {**written_by("0.3.0"), "lora_alpha": None})  # 0.3's own default, with which it couldn't be run
    with pytest.raises(AdapterFileError, match="lora_alpha should be a number, got None"):
        load_peft(folder)


def test_a_pickled_adapter_says_how_to_convert_it_and_that_works(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="weights_only=True") as refused:
        load_peft(folder)
    assert 'save_file(torch.load(file, weights_only=True), "adapter_model.safetensors")' in str(refused.value)
    from safetensors.torch import save_file

    save_file(torch.load(folder / "adapter_model.bin", weights_only=True), folder / "adapter_model.safetensors")
    assert load_peft(folder).num_parameters == sum(value.numel() for value in tensors.values())


def test_settings_of_a_newer_version_are_said_once_and_written_back(folder: Path, tmp_path: Path) -> None:
    configure(folder, {**written_by("0.20.0"), "from_the_future": {"a": [1, 2]}, "unset_in_the_future": None})
    with pytest.warns(UserWarning, match="unknown settings from_the_future are kept, and written again"):
        adapter = load_peft(folder)
    again = adapter.save(tmp_path / "again")
    settings = json.loads((again / "adapter_config.json").read_text())
    assert settings["from_the_future"] == {"a": [1, 2]}
    assert "unset_in_the_future" not in settings
    assert load_peft(again).metadata == adapter.metadata  # lorabank.json says that it was told
    third = load_peft(again).save(tmp_path / "third")
    assert (third / "adapter_config.json").read_bytes() == (again / "adapter_config.json").read_bytes()
