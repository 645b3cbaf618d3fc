"""A cached folder is whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lorabank.errors import OutputError
from lorabank.models.cache import build_folder, cache_from_environment, default_cache


def write(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write(folder)

    target = tmp_path / "a" / "b"
    assert build_folder(target, build) == build_folder(target, build) == target
    assert len(calls) == 1
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(tmp_path / "x", build)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_processes_wins(tmp_path: Path) -> None:
    target = tmp_path / "x"

    def build(folder: Path) -> None:
        write(folder)
        target.mkdir()
        (target / "file").write_text("the other process")

    assert (build_folder(target, build) / "file").read_text() == "the other process"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"disk full.*LORABANK_CACHE"):
        build_folder(tmp_path / "x", build)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        build_folder(tmp_path / "cache" / "x", write)


def test_the_environment_names_the_cache() -> None:
    assert cache_from_environment({"LORABANK_CACHE": "/somewhere"}) == Path("/somewhere")
    assert cache_from_environment({"LORABANK_CACHE": ""}) == cache_from_environment({}) == default_cache()
