from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as save_distinct

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.detect import FORMATS, load_adapter
from lorabank.formats.files import read_header

ONE = torch.ones(2, 2)
SAMPLES: dict[str, dict[str, torch.Tensor]] = {
    "kohya": {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ONE,
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": ONE,
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(2.0),
    },
    "diffusers": {"unet.down_blocks.0.attn1.to_q.lora_A.weight": ONE, "unet.down_blocks.0.attn1.to_q.lora_B.weight": ONE},
    "peft": {"base_model.model.a.lora_A.weight": ONE, "base_model.model.a.lora_B.weight": ONE},
}


def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors that may share memory."""
    save_distinct({name: value.clone() for name, value in tensors.items()}, path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_form_is_told_by_its_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "any_name.safetensors"
    save_file(SAMPLES[name], path)
    header = read_header(path)
    assert next(form for form, value in FORMATS.items() if value.recognise(header)) == name
    if name == "peft":
        with pytest.raises(AdapterFileError, match="any_name"):  # without its config
            load_adapter(path)
    else:
        (layer,) = load_adapter(path).layers
        assert layer.startswith("unet.down_blocks.0.")
        assert load_adapter(tmp_path).layers.keys() == {layer}  # a folder with this one file


def test_a_folder_its_config_and_its_tensors_all_load(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    for source in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        assert set(load_adapter(source).layers) == set(plain_adapter.layers)


def test_a_missing_path_names_the_closest(plain_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain_adapter.save(tmp_path / "out" / "formal")
    with pytest.raises(AdapterFileError, match=f"did you mean {folder}"):
        load_adapter(tmp_path / "out" / "fromal")
    with pytest.raises(AdapterFileError, match=r"did you mean .*out"):
        load_adapter(tmp_path / "outt" / "formal")
    with pytest.raises(AdapterFileError, match="holds formal"):
        load_adapter(tmp_path / "out" / "zzz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match="hf download someone/adapter"):
        load_adapter("someone/adapter")


def test_a_folder_of_adapters(plain_adapter: Adapter, tmp_path: Path) -> None:
    plain_adapter.save(tmp_path / "formal")
    with pytest.raises(AdapterFileError, match=r"folder of its own: formal.*Load one"):
        load_adapter(tmp_path)
    plain_adapter.save(tmp_path / "terse")
    with pytest.raises(AdapterFileError, match=r"holds 2 adapters: formal, terse"):
        load_adapter(tmp_path)


def test_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.embed_tokens.weight": ONE}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterFileError, match="a whole model"):
        load_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=r"no adapter.*model\.embed_tokens\.weight"):
        load_adapter(tmp_path / "model.safetensors")


def test_folders_with_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="found nothing"):
        load_adapter(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterFileError, match=r"found notes\.txt"):
        load_adapter(tmp_path)
    (tmp_path / "lora.pt").write_bytes(b"x")
    with pytest.raises(AdapterFileError, match="pickled"):
        load_adapter(tmp_path)


def test_several_files_are_not_guessed_between(tmp_path: Path) -> None:
    save_file(SAMPLES["kohya"], tmp_path / "a.safetensors")
    save_file(SAMPLES["kohya"], tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match="2 safetensors files"):
        load_adapter(tmp_path)


def test_tensors_without_their_config(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        load_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(AdapterFileError, match="name the file adapter_model"):
        load_adapter(folder)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match=r"neither a file nor a folder\. Name"):
        load_adapter(tmp_path / "adapter.safetensors")
