"""Before anything is imported: Triton's kernels run through its interpreter on a machine without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which torch.compile and transformers do


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Variants beyond those that `variants` asks for are slow; files that take long come first, so that workers end together."""
    if not torch.cuda.is_available():
        _mark_variants(items)
    slow: dict[str, int] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        slow[file] = slow.get(file, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.nodeid.partition("::")[0]])


def _mark_variants(items: list[pytest.Item]) -> None:
    """Of each test that is marked `variants(n)`, n of its variants stay, the first, the last and some between them."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("variants") is not None and item.get_closest_marker("slow") is None:
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for variants in by_test.values():
        marker = variants[0].get_closest_marker("variants")
        assert marker is not None
        wanted = min(marker.args[0], len(variants))
        stay = {round(i * (len(variants) - 1) / max(1, wanted - 1)) for i in range(wanted)}
        for i, item in enumerate(variants):
            if i not in stay:
                item.add_marker(pytest.mark.slow)
