"""Image models' files with NaN: they are looked at, and loaded by nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabank.cli import main
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.token_rows import TokenRows

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"
PATH = "unet.down_blocks.0.attentions.0.proj_in"


def kohya(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2.0)}
    return {f"{NAME}.{key}": value for key, value in (tensors | {k.replace("__", "."): v for k, v in changed.items()}).items()}


BAD = torch.full((2, 4), torch.nan)
FILES = {
    "kohya": kohya(lora_down__weight=BAD),
    "kohya, infinity": kohya(lora_down__weight=BAD.nan_to_num(torch.inf)),
    "diffusers": {f"{PATH}.lora_A.weight": BAD, f"{PATH}.lora_B.weight": torch.ones(4, 2)},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:.*change their weight by more")
def test_nan_is_shown_and_never_loaded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "style.safetensors"
    save_file(FILES[name], file)
    assert main(["inspect", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == [PATH]
    assert main(["inspect", str(file)]) == 1
    assert "NaN" in capsys.readouterr().out
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        Adapter.load(file)
    assert main(["convert", str(file), str(tmp_path / "out"), "--to", "peft"]) == 2
    assert not (tmp_path / "out").exists()


def test_nan_beside_the_layers_is_shown_in_both_forms(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(adapter_folder)
    rows = TokenRows((3,), torch.full((1, 16), torch.nan))
    config = replace(adapter.config, trainable_token_indices={"embed_tokens": [3]})
    replace(adapter, config=config, token_rows={"model.embed_tokens": rows}).save(adapter_folder)
    assert main(["inspect", str(adapter_folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == ["model.embed_tokens (token rows)"]
    assert main(["inspect", str(adapter_folder)]) == 1
    assert "NaN or infinity in model.embed_tokens (token rows)" in capsys.readouterr().out
    assert main(["convert", str(adapter_folder), str(adapter_folder / "x"), "--to", "peft"]) == 2
    assert "To look at it: `lorabank inspect`" in capsys.readouterr().err


def test_an_alpha_that_is_nan_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(kohya(alpha=torch.tensor(torch.nan)), tmp_path / "style.safetensors")
    assert main(["inspect", str(tmp_path / "style.safetensors")]) == 2
    assert f"{NAME}.alpha' holds NaN" in capsys.readouterr().err


def test_a_product_with_nan_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "loha.safetensors"
    parts = {f"hada_w{i}_{side}": torch.ones(*shape) for i in (1, 2) for side, shape in (("a", (4, 2)), ("b", (2, 4)))}
    parts["hada_w1_a"] = torch.full((4, 2), torch.nan)
    save_file({f"{NAME}.{key}": value for key, value in parts.items()}, file)
    assert main(["inspect", str(file)]) == 2
    assert "hada_w1_a' holds NaN" in capsys.readouterr().err
