"""`lorabank.train` on a GPU as a newcomer calls it: blocks are compiled unasked, and results are the plain path's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

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
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "eval": {"every": 2, "samples": 2}}
TOLERANCE = 1e-2
"""Of B's norm after four steps in fp32: sums are in another order, which AdamW's first steps make larger."""
LOSSES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Of the last validation loss, relative. bf16's own rounding moves AdamW's first steps."""


@pytest.mark.parametrize("dtype", LOSSES, ids=str)
def test_compiled_unasked_and_plain_afterwards(dtype: torch.dtype, tmp_path: Path) -> None:
    """With samples and an output, as it is unless somebody says otherwise."""
    made: Any = tiny_model()
    model, tokenizer, told = made.to("cuda", dtype), tiny_tokenizer(), Recorder()
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), output=str(tmp_path / "out"), listeners=[told], **SHORT)
    assert [notice.text for notice in told.notices].count(api.COMPILING.format("half a minute")) == 1
    assert not [notice.text for notice in told.notices if notice.text.startswith("compile: ")], "something fell back"
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    assert (tmp_path / "out" / "default" / "adapter_model.safetensors").exists()
    plain = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), compile=False, **SHORT)
    mine, theirs = (run.adapters["default"].final_metrics["loss"] for run in (result, plain))
    assert mine == pytest.approx(theirs, rel=LOSSES[dtype])
    for path, layer in result.trained["default"].layers.items() if dtype == torch.float32 else ():
        other = plain.trained["default"].layers[path].B
        assert (layer.B - other).norm() <= TOLERANCE * other.norm(), path


def test_sampling_compiles_nothing() -> None:
    """Samples are drawn while blocks are compiled, each of which would be compiled by itself for its place in the cache."""
    made: Any = tiny_model()
    counts: list[int] = []

    class Counting(Recorder):
        def on_step(self, record: Any) -> None:
            super().on_step(record)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    model = made.to("cuda", torch.bfloat16)
    lb.train(model=model, tokenizer=tiny_tokenizer(), data=tiny_rows(), listeners=[Counting()], **{**SHORT, "max_steps": 6})
    assert len(set(counts[2:])) == 1  # validation after the second step is the last that is new
