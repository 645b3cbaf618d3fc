"""Folders that hold several adapters: PEFT's own, trainers' checkpoints, runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch

from lorabank.bank.attach import attach
from lorabank.cli import main
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.choice import adapters_in
from lorabank.formats.detect import load_adapter
from lorabank.notices import warn_once
from lorabank.training.source import adapter_folders

from .conftest import llama

IDS = torch.arange(12)[None] % 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three adapters as `PeftModel.save_pretrained` leaves them."""
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name, rank in (("french", 3), ("german", 4)):
        model.add_adapter(name, peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "three")
    warn_once.cache_clear()
    return tmp_path / "three"


def test_each_of_pefts_adapters_computes_what_peft_computes(folder: Path) -> None:
    with pytest.warns(UserWarning, match="others too: french, german"):
        own = Adapter.load(folder)
    adapters = Adapter.load_all(folder)
    assert list(adapters) == ["default", "french", "german"]
    assert [adapter.config.rank for adapter in (own, *adapters.values())] == [2, 2, 3, 4]
    theirs = peft.PeftModel.from_pretrained(llama(), str(folder))
    bank = attach(llama())
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        if name != "default":
            theirs.load_adapter(str(folder / name), name)
        theirs.set_adapter(name)
        with bank.route(name), torch.no_grad():
            torch.testing.assert_close(bank.model(IDS).logits, theirs(IDS).logits)


def test_one_is_chosen_by_its_name_or_its_path(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is named needs no word about the others
        for name, rank in (("default", 2), ("french", 3), ("german", 4)):
            assert Adapter.load(f"{folder}:{name}").config.rank == rank
        assert Adapter.load(folder / "german").config.rank == 4
    with pytest.raises(AdapterFileError, match=r"no adapter 'frensh' \(did you mean 'french'\?\).*default, french, german"):
        Adapter.load(f"{folder}:frensh")


def test_a_folder_with_subfolders_only_lists_them(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    with pytest.raises(AdapterFileError, match=r"holds 2 adapters: french, german\. Load one, such as .*french, or .*:french"):
        load_adapter(folder)
    assert list(Adapter.load_all(folder)) == ["french", "german"]


def test_checkpoints_are_listed_in_their_order_and_the_newest_is_proposed(plain_adapter: Adapter, tmp_path: Path) -> None:
    for step in (1000, 500, 2000):
        plain_adapter.save(tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(AdapterFileError, match=r"checkpoint-500, checkpoint-1000, checkpoint-2000\. Load one.*checkpoint-2000"):
        load_adapter(tmp_path / "run")
    with pytest.raises(AdapterFileError, match=r"3 adapters: run/checkpoint-500"):
        load_adapter(tmp_path)
    assert Adapter.load(f"{tmp_path}:run/checkpoint-500").layers.keys() == plain_adapter.layers.keys()


def test_other_stages_of_one_adapter_are_no_other_adapters(plain_adapter: Adapter, tmp_path: Path) -> None:
    for name in (".", "last", "checkpoint-500"):
        plain_adapter.save(tmp_path / name)
    assert list(adapters_in(tmp_path)) == ["default"]
    load_adapter(tmp_path)  # a warning would be an error
    with pytest.raises(AdapterFileError, match="no adapter 'lost'"):
        load_adapter(f"{tmp_path}:lost")


def test_a_path_with_a_colon_is_itself(plain_adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plain_adapter.save(tmp_path / "a:b")
    assert Adapter.load(tmp_path / "a:b").layers.keys() == plain_adapter.layers.keys()
    with pytest.raises(AdapterFileError, match="holds no adapters"):
        Adapter.load(f"{tmp_path / 'a'}:c")


def test_a_file_is_no_folder_of_adapters(plain_adapter: Adapter, tmp_path: Path) -> None:
    file = plain_adapter.save(tmp_path / "a") / "adapter_model.safetensors"
    with pytest.raises(AdapterFileError, match="not a folder of adapters"):
        Adapter.load_all(file)
    with pytest.raises(AdapterFileError, match="no such file"):
        Adapter.load_all(tmp_path / "missing")


def test_commands_take_a_folder_with_a_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}:french", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["rank"] == 3
    assert main(["combine", f"{folder}:french:0.5", f"{folder}:german:0.5", "--output", str(tmp_path / "both")]) == 0
    assert Adapter.load(tmp_path / "both").config.rank == 7
    assert main(["convert", f"{folder}:german", str(tmp_path / "german"), "--to", "peft"]) == 0
    assert Adapter.load(tmp_path / "german").config.rank == 4
    assert main(["export", f"{folder}:french", "--to", "vllm", "--output", str(tmp_path / "vllm")]) == 0
    assert main(["inspect", f"{folder}:germann"]) == 2
    assert "did you mean 'german'" in capsys.readouterr().err


def test_a_loaded_run_names_them_as_peft_does(folder: Path) -> None:
    assert adapter_folders(folder) == {"default": folder, "french": folder / "french", "german": folder / "german"}
