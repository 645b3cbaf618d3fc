"""What waits on the host is asked for before it is pinned: nobody says so afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorabank.engine import host_memory, offload
from lorabank.engine.offload import Offload
from lorabank.engine.parts import Fits
from lorabank.errors import TooLargeError
from tests.engine.tiny import batch_of

GIB = 2**30


def machine(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, droppable: int) -> dict[str, str]:
    second = folder == "sys/fs/cgroup"
    names = ("memory.max", "memory.current", "inactive_file")
    if not second:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\n{names[2]} {droppable}\n",
    }


def test_what_this_machine_has() -> None:
    found = host_memory.available()
    assert found is not None
    assert 0 < found < 2**50


@pytest.mark.parametrize("folder", ["sys/fs/cgroup", "sys/fs/cgroup/memory"])
def test_a_containers_limit_counts(folder: str, tmp_path: Path) -> None:
    assert host_memory.available(machine(tmp_path)) == 8 * GIB
    limited = machine(tmp_path, **group(folder, str(4 * GIB), used=3 * GIB, droppable=GIB // 2))
    assert host_memory.available(limited) == GIB + GIB // 2
    assert host_memory.available(machine(tmp_path, **group(folder, str(2**63 - 4096), used=GIB, droppable=0))) == 8 * GIB
    assert host_memory.available(machine(tmp_path, **group(folder, str(GIB), used=2 * GIB, droppable=0))) == 0
    assert host_memory.available(machine(tmp_path, **group(folder, "max", used=GIB, droppable=0))) == 8 * GIB


def test_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_memory.available(tmp_path) is None
    monkeypatch.setattr(host_memory, "available", lambda: None)
    host_memory.check_pinning(2**60)


def test_torch_pins_powers_of_two() -> None:
    assert [host_memory.pinned(size) for size in (0, 1, 2, 3, 4096, 4097)] == [1, 1, 2, 4, 4096, 8192]


def test_what_is_not_there_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    stats: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: stats)
    monkeypatch.setattr(host_memory, "available", lambda: 3 * GIB)
    host_memory.check_pinning(2 * GIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB of the host's memory are wanted .*, of 25% of 2\.00 GiB left"):
        host_memory.check_pinning(2 * GIB, 0.25)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB of the host's memory are wanted .*, of 2\.00 GiB left"):
        host_memory.check_pinning(2 * GIB + 1)
    stats |= {"allocated_bytes.current": 5 * GIB, "active_bytes.current": 4 * GIB}  # one that torch has and nobody uses
    host_memory.check_pinning(3 * GIB)
    monkeypatch.setattr(host_memory, "available", lambda: 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"0\.00 GiB left"):
        host_memory.check_pinning(1)


def test_buffers_for_a_gpu_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pinning."""
    asked: list[tuple[int, float]] = []
    empty = torch.empty_strided
    monkeypatch.setattr(host_memory, "check_pinning", lambda nbytes, share=1.0: asked.append((nbytes, share)))
    monkeypatch.setattr(torch, "empty_strided", lambda *args, pin_memory, **more: empty(*args, **more))
    size, cuda, cpu = torch.Size((3, 5)), torch.device("cuda"), torch.device("cpu")
    held = Offload()
    held._needed["here"][size, (5, 1), torch.float32, cpu] = 2
    held.reserve("here")
    assert not asked
    held._needed["there"][size, (5, 1), torch.bfloat16, cuda] = 3
    held.reserve("there")
    assert asked == [(3 * 32, offload.SHARE), *[(32, 1.0)] * 3]
    held.reserve("there")
    assert len(asked) == 4  # all of it was set aside


def test_the_way_out_is_not_what_filled_the_host() -> None:
    def compute(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"2.00 GiB {host_memory.WANTED} for what waits there, of 1.00 GiB left")

    with pytest.raises(TooLargeError, match="Set activation_offloading: false where the GPU has room") as caught:
        Fits().in_parts(batch_of([5], ["a"]), compute, lambda: False)
    assert "activation_offloading: true" not in str(caught.value)
