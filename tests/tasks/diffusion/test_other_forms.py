"""What `predict` makes of a pipeline alone, and of an adapter in other tools' forms, which don't name their base."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabank.cli import main
from tests.tasks.diffusion.test_merge import trained
from tests.tasks.diffusion.tiny import pipeline

SMALL = ["--size", "16x16", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pipeline("sd").save_pretrained(folder)
    return folder


def test_a_pipeline_draws_without_an_adapter(base: Path, tmp_path: Path) -> None:
    assert main(["predict", str(base), "--prompt", "a cat", "--output", str(tmp_path / "cats"), *SMALL]) == 0
    assert (tmp_path / "cats" / "sheet.png").is_file()


def test_other_forms_are_told_the_way(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(base, tmp_path / "a", targets=["to_q"])
    for form, name, kind in (
        ("kohya", "a.safetensors", "a file of weights"),
        ("diffusers", "d", "an adapter in diffusers' form"),
    ):
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / name), "--to", form]) == 0
        capsys.readouterr()
        asked = ["predict", str(tmp_path / name), "--prompt", "a cat", "--output", str(tmp_path / "cats"), *SMALL]
        assert main(asked) != 0
        said = capsys.readouterr().err
        assert kind in said and f"lorabank convert {tmp_path / name} FOLDER --to peft --model BASE" in said
        back = ["convert", str(tmp_path / name), str(tmp_path / f"{form}-back"), "--to", "peft", "--model", str(base)]
        assert main(back) == 0  # as it was told
        asked[1] = str(tmp_path / f"{form}-back")
        assert main(asked) == 0
        assert len(list((tmp_path / "cats").glob("*.png"))) == 3  # the base's, the adapter's, and both on a sheet
        asked[5] = str(tmp_path / "cats2")
        for file in (tmp_path / "cats").iterdir():
            file.unlink()
        (tmp_path / "cats").rmdir()
