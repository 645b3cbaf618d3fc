"""What was never checked in another server isn't said to be read by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorabank import Adapter, AdapterConfig
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.readers import obstacles


@pytest.mark.parametrize("reader", ["vllm", "gguf"])
def test_an_adapter_of_a_task_that_was_not_checked_there(reader: str) -> None:
    layer = AdapterLayer(A=torch.ones(2, 4), B=torch.ones(4, 2), scaling=1.0)
    plain = Adapter(config=AdapterConfig(rank=2), layers={"model.layers.0.self_attn.q_proj": layer})
    assert obstacles(plain, reader) == []
    assert obstacles(replace(plain, metadata={"task": "text-classification"}), reader) == []
    (found,) = obstacles(replace(plain, metadata={"task": "image-classification"}), reader)
    assert "image-classification was ever checked" in found.what
