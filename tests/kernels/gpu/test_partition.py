"""What a compiled block keeps for backward, and what backward computes again: seen in the code that a GPU would get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LAYERS = {"llama": 7, "gpt2": 4, "opt": 6, "gemma2": 7}
"""Adapted layers of a block."""
WAYS = ("all", "products", "inputs", "attention")


FAMILIES = ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.long) for name in ("opt", "gemma2"))]


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ways(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "LORABANK_NATIVE": "0",
        "PYTHONPATH": str(HERE.parents[2]),
    }
    ways = [*WAYS, *(f"{way}:{how}" for way in WAYS for how in ("mlps", "fp8"))]
    done = subprocess.run(
        [sys.executable, HERE / "partition_blocks.py", family, *ways],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["kept"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_no_product_is_made_twice_to_save_memory(family: str, ways: dict[str, dict[str, Any]]) -> None:
    for kept in ("all", "products"):
        assert ways[kept]["products"] == LAYERS[family]  # the input gradients alone
        assert ways[kept]["attentions"] == 0
    least = {"llama": 0.8, "gpt2": 0.7, "opt": 1.0, "gemma2": 0.8}[family]  # OPT's ReLU and norms keep little as it is
    assert ways["products"]["bytes"] <= least * ways["all"]["bytes"]


@pytest.mark.slow
def test_recomputation_keeps_nothing_and_leaves_the_last_product_out(family: str, ways: dict[str, dict[str, Any]]) -> None:
    assert ways["inputs"]["bytes"] == 0
    again = ways["inputs"]["products"] - LAYERS[family]
    # Gemma 2 has a norm behind its last product, whose gradient needs it
    assert again == LAYERS[family] - (family != "gemma2")


AGAIN = {
    "llama": ["32x16", "32x16", "32x32", "32x48", "32x48"],
    "gpt2": ["32x128", "32x96"],
    "opt": ["32x32", "32x32", "32x32", "32x48"],
}
"""Sizes of the products before the attention and up to the MLP's last one."""


@pytest.mark.slow
def test_with_attention_kept_neither_it_nor_the_product_behind_it_is_made_again(
    family: str, ways: dict[str, dict[str, Any]]
) -> None:
    kept, inputs = ways["attention"], ways["inputs"]
    if family == "gemma2" and not inputs["attentions"]:  # its soft-capped attention is many operations
        assert {**kept, "kept": ""} == {**inputs, "kept": ""}
        return
    if family == "gemma2":  # one, as older transformers have it; what else is made again is as in the others
        assert (kept["attentions"], kept["bytes"]) == (0, 2 * 32 + 4 * 4 + 2 * 32)
        return
    assert (inputs["attentions"], kept["attentions"]) == (1, 0)
    assert kept["again"] == AGAIN[family]
    assert inputs["again"] == sorted([*AGAIN[family], "32x32"])  # the output projection
    assert kept["bytes"] == 2 * 32 + 4 * 4 + 2 * 32  # attention's output, a sum a head, the hidden state; two bytes a number


GRADIENTS = ["lora_mlp_close_backward", "lora_mlp_open_backward"]


@pytest.mark.slow
def test_of_a_gated_mlp_as_ops_the_last_product_is_not_made_again(family: str, ways: dict[str, dict[str, Any]]) -> None:
    for way in WAYS:
        found, plain = ways[f"{way}:mlps"], ways[way]
        if family in ("gpt2", "opt"):  # nothing is gated; OPT's layers have borders, which are products of another name
            same = plain if family == "gpt2" else {**plain, "products": 0, "again": []}
            assert {**found, "kept": way} == same
            continue
        again = [] if way in ("all", "products") else ["lora_mlp_open"]
        if again and family == "gemma2":  # a norm behind the MLP needs what it gave
            again.append("lora_mlp_close")
        assert found["mlps"] == sorted([*GRADIENTS, *again])
        assert found["attentions"] == plain["attentions"]
        if again:
            assert found["bytes"] == plain["bytes"]


@pytest.mark.slow
def test_over_an_fp8_base_the_last_product_is_not_made_again_either(family: str, ways: dict[str, dict[str, Any]]) -> None:
    """Two ops with one gradient: frozen products gate and up are kept, as without the ops, or made again with their xAᵀ."""
    for way in WAYS if family in ("llama", "gemma2") else ():
        again = [] if way in ("all", "products") else ["lora_gated_open"]
        if again and family == "gemma2":  # a norm behind the MLP needs what it gave
            again.append("lora_gated_close")
        found = ways[f"{way}:fp8"]
        assert found["mlps"] == sorted(["lora_gated_close_backward", *again])
        assert found["attentions"] == ways[way]["attentions"]
        assert found["bytes"] <= ways[way]["bytes"]
