"""The Triton kernels: through Triton's interpreter on a machine without a GPU, compiled on one that has a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the first import of one


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_itemcollected(item: pytest.Item) -> None:
    """The interpreter takes its time: two variants of a test in the suite, all of them in `make test-all` and on a GPU."""
    if item.get_closest_marker("variants") is None:
        item.add_marker(pytest.mark.variants(2))
