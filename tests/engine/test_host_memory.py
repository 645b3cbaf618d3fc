"""What waits on the host is asked for before it is pinned: nobody says so afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabank.engine import host_memory
from lorabank.engine.host_memory import HostMemory
from lorabank.engine.parts import Fits
from lorabank.errors import TooLargeError
from tests.engine.tiny import batch_of

GIB = 2**30


def machine(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, *droppable: int) -> dict[str, str]:
    second = not folder.startswith("sys/fs/cgroup/memory")
    names = ["memory.max", "memory.current", "inactive_file", "active_file"]
    if not second:
        names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"]
    stats = "".join(f"{name} {value}\n" for name, value in zip(names[2:], droppable, strict=False))
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\n{stats}",
    }


def test_what_this_machine_has() -> None:
    found = host_memory.available()
    assert found is not None
    assert 0 < found < 2**50


@pytest.mark.parametrize("folder", ["sys/fs/cgroup", "sys/fs/cgroup/memory"])
def test_a_containers_limit_counts(folder: str, tmp_path: Path) -> None:
    assert host_memory.available(machine(tmp_path)) == 8 * GIB
    limited = machine(tmp_path, **group(folder, str(4 * GIB), 3 * GIB, GIB // 2, GIB // 4))
    assert host_memory.available(limited) == GIB + GIB // 2 + GIB // 4
    assert host_memory.available(machine(tmp_path, **group(folder, str(2**63 - 4096), GIB, 0))) == 8 * GIB
    assert host_memory.available(machine(tmp_path, **group(folder, str(GIB), 2 * GIB))) == 0
    assert host_memory.available(machine(tmp_path, **group(folder, "max", GIB, 0))) == 8 * GIB


@pytest.mark.parametrize(
    ("folder", "line"), [("sys/fs/cgroup", "0::/jobs/7\n"), ("sys/fs/cgroup/memory", "5:cpu:/\n4:memory,hugetlb:/jobs/7\n")]
)
def test_limits_of_the_groups_around_ours_count(folder: str, line: str, tmp_path: Path) -> None:
    """As a batch system sets them, without a view of its own."""
    inside = {"proc/self/cgroup": line, **group(f"{folder}/jobs/7", str(6 * GIB), GIB)}
    assert host_memory.available(machine(tmp_path, **inside)) == 5 * GIB
    assert host_memory.available(machine(tmp_path, **group(f"{folder}/jobs", str(4 * GIB), GIB))) == 3 * GIB
    assert host_memory.available(machine(tmp_path, **group(f"{folder}/others", str(2 * GIB), GIB))) == 3 * GIB


def test_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_memory.available(tmp_path) is None
    monkeypatch.setattr(host_memory, "available", lambda: None)
    host_memory.check(2**60)


def test_what_is_not_there_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 3 * GIB)
    host_memory.check(2 * GIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB of the host's memory are wanted .*, of 25% of 2\.00 GiB left"):
        host_memory.check(2 * GIB, 0.25)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB of .*, of 2\.00 GiB left \(1\.00 GiB stay free\)"):
        host_memory.check(2 * GIB + 1)
    host_memory.check(GIB, 0.25, owned=2 * GIB)
    monkeypatch.setattr(host_memory, "available", lambda: 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"of 0\.00 GiB left"):
        host_memory.check(1)


def places(memory: HostMemory, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first byte, byte behind the last) of each."""
    memory.restart()
    found = [memory.take(size) for size in sizes]
    assert [len(tensor) for tensor in found] == list(sizes)
    return [(tensor.data_ptr(), tensor.data_ptr() + len(tensor)) for tensor in found]


def test_what_is_given_out_does_not_overlap_and_comes_again() -> None:
    memory, sizes = HostMemory(), [700_000, 1, 300_000, 512, 5_000_000, 3_000_000, 900_000]
    first = places(memory, sizes)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(sorted(first)))
    assert all(start % 64 == 0 for start, _ in first)
    held = memory.nbytes
    assert places(memory, sizes) == first
    places(memory, [400_000] * 20)
    places(memory, [100, 200])
    assert memory.nbytes == held
    assert held & (held - 1) == 0 or all(len(p) & (len(p) - 1) == 0 for p in memory._pieces)  # torch pins powers of two
    assert held <= 4 * sum(sizes)


def test_little_is_left_over() -> None:
    for size in (3_000_000, 4_194_304, 4_194_305, 5_700_000):
        memory = HostMemory()
        places(memory, [size] * 64)
        assert memory.nbytes <= 64 * size / 0.6


def test_a_host_that_is_nearly_full_gives_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    room = host_memory.KEPT_FREE + 5 * 2**20
    monkeypatch.setattr(host_memory, "available", lambda: room - memory.nbytes)
    with pytest.raises(torch.OutOfMemoryError):
        places(memory, [1_000_000] * 6)
    assert memory.nbytes <= 5 * 2**20
    assert places(memory, [500_000] * 8)  # what was taken serves others
    with pytest.raises(torch.OutOfMemoryError, match="25% of"):
        memory.make_room([1_000_000] * 2, 0.25)  # of 5 MiB in all
    memory.make_room([1_000_000], 0.25)


def test_pieces_are_split_off_and_come_back() -> None:
    memory, sizes = HostMemory(), [600_000, 600_000, 100]
    first = places(memory, sizes)
    memory.restart()
    memory.make_room(sizes, 1.0)
    other = HostMemory(memory.split_off(sizes), grows=False)
    assert places(other, sizes) == first
    with pytest.raises(torch.OutOfMemoryError, match="weren't set aside"):
        other.take(1_000_000)
    assert set(places(memory, sizes)).isdisjoint(first)
    held = memory.nbytes
    memory.add(other._pieces)
    assert memory.nbytes == held + other.nbytes
    assert memory.split_off([]) == []


def test_the_way_out_is_not_what_filled_the_host() -> None:
    def compute(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"2.00 GiB {host_memory.WANTED} for what waits there, of 1.00 GiB left")

    with pytest.raises(TooLargeError, match="Set activation_offloading: false where the GPU has room") as caught:
        Fits().in_parts(batch_of([5], ["a"]), compute, lambda: False)
    assert "activation_offloading: true" not in str(caught.value)
