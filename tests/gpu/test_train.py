"""`lorabank.train` on a GPU as a newcomer calls it: blocks are compiled unasked, and results are the plain path's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorabank as lb
from lorabank import api
from tests.training.test_joint import Recorder
from tests.training.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "eval": {"every": 2, "samples": 0}}
TOLERANCE = 1e-2
"""Of B's norm after four steps in fp32: sums are in another order, which AdamW's first steps make larger."""


def test_compiled_unasked_and_plain_afterwards() -> None:
    model, tokenizer, told = tiny_model().cuda(), tiny_tokenizer(), Recorder()
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), listeners=[told], **SHORT)
    assert [notice.text for notice in told.notices].count(api.COMPILING) == 1
    assert not [notice.text for notice in told.notices if notice.text.startswith("compile: ")], "something fell back"
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    plain = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), compile=False, **SHORT)
    for path, layer in result.trained["default"].layers.items():
        other = plain.trained["default"].layers[path].B
        assert (layer.B - other).norm() <= TOLERANCE * other.norm(), path
