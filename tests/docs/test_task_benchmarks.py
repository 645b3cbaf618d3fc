"""The benchmarks of tasks compare like with like: one adapter gives both systems the same loss and gradients."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*each adapter trains a head of its own", "ignore:`is_gradient_checkpointing`")


def bench(name: str) -> Any:
    if (folder := str(ROOT / "benchmarks")) not in sys.path:  # they are scripts, which import each other by name
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def test_text_classification() -> None:
    found = bench("text_classification").check_equal(argparse.Namespace(layers=1))
    assert found["loss_difference"] < 1e-5


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_image_classification(model: str) -> None:
    script = bench("image_classification")
    work = script.Work(system="", model=model, rows=4, adapters=1, size=64, blocks=1, device="cpu", bf16=False)
    assert script.check_equal(work)["loss_difference"] < 1e-5


@pytest.mark.slow
def test_speech_recognition() -> None:
    script = bench("speech_recognition")
    found = script.check_equal(script.Work(system="both", rows=2, shape="tiny", tokens=16))
    assert found["loss_difference"] < 1e-4
    assert found["gradient_difference"] < 1e-3


def test_the_rows_of_speech_are_different_recordings() -> None:
    """Features are kept by a row's digest, so rows that share one would be heard once."""
    script = bench("speech_recognition")
    rows = [script.row_of(samples, (1, 2), str(i)) for i, samples in enumerate(script.sounds(3))]
    assert len({row.digest for row in rows}) == len({row.samples().tobytes() for row in rows}) == 3
