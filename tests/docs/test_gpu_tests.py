"""The command that runs a GPU's tests, on a folder of tiny ones: what it counts, what it never takes for passed, its page."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.gpu_rows import GPU, HEAD, line_of, ours, step
from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # they are scripts, which import each other by name

gpu_results = importlib.import_module("gpu_results")
gpu_table = importlib.import_module("gpu_table")
gpu_tests = importlib.import_module("gpu_tests")

FILES = {
    "test_right.py": """
        import pytest
        @pytest.mark.parametrize("how", ["kernel by kernel", "as a graph"])
        def test_it(how): pass
        def test_elsewhere(): pytest.skip("no GPU on this machine")
        @pytest.mark.xfail(strict=True)
        def test_known(): assert False
        """,
    "test_wrong.py": """
        import pytest
        @pytest.fixture
        def left():
            yield
            raise ValueError("left over")
        def test_one(): pass
        def test_two(): assert 1 == 2
        def test_three(left): pass
        """,
    "test_broken.py": "import nowhere_to_be_found\n",
    "test_dies.py": """
        import os
        def test_first(): pass
        def test_then(): os._exit(3)
        def test_never(): pass
        """,
    "test_slow.py": """
        import time
        def test_quick(): pass
        def test_long(): time.sleep(60)
        """,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with such files, and a GPU that is only said to be there."""
    for name, text in FILES.items():
        path = tmp_path / "tests" / "gpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()), encoding="utf-8")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "gpu_name", lambda: GPU)
    return tmp_path


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """(exit status, the run, its rows by name)."""
    path = folder / "tests.json"
    status = gpu_tests.main(["--output", str(path), "--commit", "abc", *more])
    (found,) = gpu_results.load_runs([path])
    return status, found, {row["file"].removeprefix("tests/gpu/test_").removesuffix(".py"): row for row in found["rows"]}


def counts(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("finished", *gpu_tests.COUNTS))


def test_each_file_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tests" / "gpu" / "test_slow.py").unlink()
    status, found, rows = run(folder, "--limit", "120", "--workers", "2")
    assert status == 1
    assert (found["kind"], found["gpu"], found["commit"]) == ("tests", GPU, "abc")
    assert {"gpu_uuid", "versions", "date"} <= found.keys()
    assert rows.keys() == {"right", "wrong", "broken", "dies"}
    assert counts(rows["right"]) == (True, 2, 0, 2, 0)
    assert counts(rows["wrong"]) == (True, 1, 2, 0, 0)
    assert rows["wrong"]["failures"] == ["test_two", "test_three"]
    assert counts(rows["broken"])[0] is False
    assert rows["broken"]["why"].startswith("ended with 2: ")
    assert counts(rows["dies"]) == (False, 1, 0, 0, 2)
    assert rows["dies"]["why"].startswith("ended with 3: ")
    assert [name for name, row in rows.items() if gpu_tests.all_passed(row)] == ["right"]
    printed = capsys.readouterr().out
    assert "tests/gpu/test_wrong.py" in printed
    assert "assert 1 == 2" in printed


def test_what_the_limit_cuts_off_is_not_passed(folder: Path) -> None:
    status, _, rows = run(folder, "--limit", "10", "--files", "tests/gpu/test_slow.py")
    assert status == 1
    assert counts(rows["slow"]) == (False, 1, 0, 0, 1)
    assert rows["slow"]["why"] == "stopped: the limit was up"
    assert not gpu_tests.all_passed(rows["slow"])


def test_what_is_not_begun_is_recorded_as_that(folder: Path) -> None:
    status, _, rows = run(folder, "--limit", "0", "--files", "tests/gpu/test_right.py")
    assert status == 1
    assert rows == {"right": {"file": "tests/gpu/test_right.py", "finished": False, "why": "not begun: the limit was up"}}
    assert "0 passed" not in gpu_tests.describe(rows["right"])


def test_a_part_that_passes_gives_no_error(folder: Path) -> None:
    status, _, rows = run(folder, "--files", "tests/gpu/test_right.py")
    assert (status, list(rows)) == (0, ["right"])


def test_half_a_line_of_a_log_is_no_test() -> None:
    lines = [json.dumps(entry) + "\n" for entry in ({"collected": 2}, {"test": "test_a[{}]", "outcome": "passed"})]
    for cut in range(len(lines[1])):
        assert counts(gpu_tests.counted("x", lines[0] + lines[1][:cut])) == (False, 0, 0, 0, 2)
    assert counts(gpu_tests.counted("x", "".join(lines))) == (False, 1, 0, 0, 1)
    assert counts(gpu_tests.counted("x", "")) == (False, 0, 0, 0, None)


def row(file: str, passed: int = 3, failed: int = 0, not_finished: int = 0) -> dict[str, Any]:
    failures = [f"test_{i}" for i in range(failed)]
    found = {"file": file, "finished": not not_finished, "passed": passed, "failed": failed, "skipped": 1}
    return {**found, "not_finished": not_finished, "failures": failures}


def test_the_page_has_the_latest_run_and_the_last_in_which_all_passed() -> None:
    first = {"kind": "tests", **HEAD, "rows": [row("a.py"), row("b.py"), row("d.py", passed=0)]}
    later = {**first, "date": "2026-01-02", "commit": "def"}
    later["rows"] = [
        row("a.py", 2, 1), row("b.py", 1, 0, 2), {"file": "c.py", "finished": False, "why": "not begun: the limit was up"},
        {"file": "d.py", "finished": False, "why": "not begun: the limit was up"},
    ]  # fmt: skip
    for runs in ([first, later], [later, first]):
        page = gpu_tests.tests_page(runs)
        assert line_of(page, "a.py")[2:] == ["2", "1", "1", "0", "def, 2026-01-02", "abc, 2026-01-01", "test_0"]
        assert line_of(page, "b.py")[2:] == ["1", "0", "1", "2", "def, 2026-01-02", "abc, 2026-01-01", "not finished"]
        assert line_of(page, "c.py")[2:7] == ["–", "–", "–", "–", "def, 2026-01-02"]
        assert line_of(page, "c.py")[7:] == ["never", "not begun: the limit was up"]
        assert line_of(page, "d.py")[2:8] == ["0", "0", "1", "0", "abc, 2026-01-01", "never"]  # nothing in it passed
    other = {**first, "gpu": "NVIDIA H200", "rows": [row("a.py")]}
    assert gpu_tests.tests_page([first, other]).count("| a.py |") == 2
    assert f"Tests: {GPU}, torch 2.11.0, commit abc, 2026-01-01" in gpu_tests.tests_page([first])


def test_runs_of_tests_are_no_rows_of_other_tables() -> None:
    tests = {"kind": "tests", **HEAD, "rows": [row("a.py")]}
    measured = ours(step("one-2x2048", 250.0))
    assert gpu_table.page([measured, tests]) == gpu_table.page([measured])


def test_there_is_a_message_without_a_gpu_and_without_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "gpu_name", lambda: None)
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu_tests.main([])
    assert gpu_table.recorded(gpu_tests.tests_page, [folder / "none.json"]) == gpu_table.NOTHING


def test_all_the_files_are_found() -> None:
    files = gpu_tests.all_files()
    assert {str(Path(file).parent) for file in files} == {"tests/gpu", "tests/kernels/gpu"}
    assert all(re.fullmatch(r"tests/.*/test_\w+\.py", file) and (ROOT / file).exists() for file in files)


def test_the_name_of_a_card_is_asked_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --query-gpu=name ] && echo NVIDIA H200\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_results.gpu_name() == "NVIDIA H200"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu_results.gpu_name() is None
