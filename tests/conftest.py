"""Before anything is imported: Triton's kernels run through its interpreter on a machine without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which torch.compile and transformers do


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: workers that take a file at a time then end together."""
    slow: dict[str, int] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        slow[file] = slow.get(file, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.nodeid.partition("::")[0]])
