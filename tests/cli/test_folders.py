"""Where commands write: no folder of the user's is touched, and nothing is left behind after a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from lorabank.cli.folders import refuse_existing, whole_folder
from lorabank.cli.main import main
from lorabank.errors import OutputError
from lorabank.formats.adapter import Adapter


@pytest.mark.parametrize("command", ["combine", "convert"])
def test_a_folder_of_the_users_beside_the_output_is_left_alone(command: str, adapter_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".out.part" / "mine"
    mine.parent.mkdir()
    mine.write_text("kept")
    out = str(tmp_path / "out")
    lines = {
        "combine": ["combine", f"{adapter_folder}:1", "--output", out],
        "convert": ["convert", str(adapter_folder), out, "--to", "peft"],
    }
    assert main(lines[command]) == 0
    assert Adapter.load(out).layers
    assert mine.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out", ".out.part"}


def test_a_refused_conversion_leaves_no_folders(adapter_folder: Path, tmp_path: Path) -> None:
    line = ["convert", str(adapter_folder), str(tmp_path / "a" / "b" / "out"), "--to", "peft", "--dtype", "bf16"]
    assert main(line) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_folder_is_whole_or_absent_and_readable_as_any_other(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "a" / "b") as made:
        (made / "x").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "a" / "b") as made:
        (made / "x").touch()
    (tmp_path / "plain").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("output", ["", ".", "./", "..", "a/.."])
def test_an_output_without_a_name(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"--output: '[./a]*' isn't the name of something new"):
        refuse_existing(output)
    for line in (
        ["combine", "no-adapter:1", "--output", output],
        ["merge", "no-adapter", "--output", output],
        ["export", "no-adapter", "--to", "vllm", "--output", output],
        ["convert", "no-adapter", output, "--to", "peft"],
    ):
        assert main(line) == 2, line


def test_a_file_is_no_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file, so nothing can be written in it"):
        refuse_existing(str(tmp_path / "file" / "x" / "a.gguf"))


def test_a_disk_that_is_full_for_safetensors_is_one_sentence(tmp_path: Path) -> None:
    """Its writer raises an error of its own."""
    with pytest.raises(OutputError, match=r"merged: can't be written: .*No space left"), whole_folder(tmp_path / "merged"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())
