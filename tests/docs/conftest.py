"""A folder like a user's, in which the pages' code runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.docs.pages import ROOT, blocks


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: `run.yaml` and the configuration of the run `out/support`, both as docs/training.md has them."""
    text = blocks(ROOT / "docs" / "training.md", "yaml")[0].text
    (tmp_path / "out" / "support").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "out" / "support" / "config.yaml").write_text(text, encoding="utf-8")
    for name, classes in (("signs", ("one", "two")), ("letters", ("a", "b", "c"))):  # docs/image-classification.md
        for number, kind in enumerate(classes):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), (80 * number, 40 * i, 90)).save(tmp_path / name / kind / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path
