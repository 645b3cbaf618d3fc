"""Every example that needs no download runs to its end, with few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.variants(3)

ARGUMENTS = {"summarization": ["--steps", "4"], "text_to_image": ["--steps", "2"]}
FUNCTIONS = {"object_detection": "steps=2", "speech_synthesis": "steps=2", "image_classification": "each=4, epochs=1"}
"""Scripts whose `main` takes what makes it short."""


@pytest.mark.parametrize("name", [*ARGUMENTS, *FUNCTIONS])
def test_it_runs(name: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / f"{name}.py"
    short = FUNCTIONS.get(name)
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {name}; {name}.main('out/run', {short})"
    command = ["-c", code] if short else [str(script), *ARGUMENTS[name]]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    folders = [path.parent for path in (tmp_path / "out").rglob("adapter_config.json")]
    assert len({folder for folder in folders if folder.name != "last"}) >= 2
