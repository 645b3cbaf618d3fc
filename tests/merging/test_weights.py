"""Weights for each layer, block and part: which part counts where, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.merging.combine import combine
from lorabank.merging.weights import BLOCK_LISTS, as_text, from_text, layer_weights

PATHS = [
    f"model.layers.{i}.{leaf}" for i in (0, 1, 2, 11, 12) for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]
UNET = {
    "unet.conv_in": "IN00",
    "unet.down_blocks.0.attentions.0.proj_in": "IN01",
    "unet.down_blocks.0.resnets.1.conv1": "IN02",
    "unet.down_blocks.0.downsamplers.0.conv": "IN03",
    "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q": "IN08",
    "unet.down_blocks.3.resnets.1.conv2": "IN11",
    "unet.mid_block.attentions.0.proj_in": "MID",
    "unet.up_blocks.0.resnets.2.conv1": "OUT02",
    "unet.up_blocks.0.upsamplers.0.conv": "OUT02",
    "unet.up_blocks.1.attentions.0.proj_out": "OUT03",
    "unet.up_blocks.3.attentions.2.proj_out": "OUT11",
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": "BASE",
}
"""Layers of a U-Net as diffusers names them → kohya's block: the original U-Net's input_blocks and output_blocks, by number."""


def by_layer(weights: Any, paths: list[str] | None = None) -> dict[str, float]:
    return layer_weights(weights, PATHS if paths is None else paths, "the weight of adapter 0")


def chosen(part: str) -> set[str]:
    return {path for path, weight in by_layer({part: 1.0, "*": 0.0} if part != "*" else {"*": 1.0}).items() if weight}


def test_the_first_part_that_matches_counts() -> None:
    found = by_layer({"model.layers.0-11": 0.2, "mlp": 0.8, "*": 0.5})
    for path, weight in found.items():
        expected = 0.2 if ".12." not in path else 0.8 if "mlp" in path else 0.5
        assert weight == expected, path
    assert by_layer({"mlp": 0.8, "layers.0-11": 0.2, "*": 0.5})["model.layers.0.mlp.up_proj"] == 0.8


@pytest.mark.parametrize(
    ("part", "count"),
    [("mlp", 5), ("layers.1", 3), ("1", 3), ("layers.1-2", 6), ("0-11.mlp", 4), ("self_attn.q_proj", 5), ("?_proj", 10),
     ("layers.1*.self_attn", 6), ("[qk]_proj", 10), ("[!q]_proj", 5), (r"re:.*\.1\d\..*", 6), ("*", 15),
     ("model.layers.12.mlp.up_proj", 1), ("*_proj", 15)],
)  # fmt: skip
def test_parts_are_whole_names(part: str, count: int) -> None:
    """`layers.1` isn't layer 11, and `*` in a name doesn't reach over a dot."""
    assert len(chosen(part)) == count, chosen(part)


def test_nested_mappings_join_as_diffusers_has_them() -> None:
    weights = {
        "unet": {"down": 0.9, "mid": 0.4, "up": {"block_0": 0.6, "block_1": [0.1, 0.2, 0.3], "*": 0.7}, "conv_in": 0.0},
        "text_encoder": 0.5,
    }
    paths = [path for path in UNET if "up_blocks.1" not in path]
    paths += [f"unet.up_blocks.1.attentions.{i}.proj_in" for i in range(3)]
    found = by_layer(weights, paths)
    assert found["unet.down_blocks.3.resnets.1.conv2"] == 0.9
    assert found["unet.mid_block.attentions.0.proj_in"] == 0.4
    assert found["unet.up_blocks.0.upsamplers.0.conv"] == 0.6
    assert [found[f"unet.up_blocks.1.attentions.{i}.proj_in"] for i in range(3)] == [0.1, 0.2, 0.3]
    assert found["unet.up_blocks.3.attentions.2.proj_out"] == 0.7
    assert found["text_encoder.text_model.encoder.layers.3.self_attn.q_proj"] == 0.5


def test_kohyas_blocks_are_those_of_the_original_unet() -> None:
    names = BLOCK_LISTS[26]
    numbers = [float(i + 1) for i in range(26)]
    for path, weight in by_layer(numbers, list(UNET)).items():
        assert names[int(weight) - 1] == UNET[path], path
    by_name = by_layer({"IN01": 0.25, "OUT02": 0.75, "M00": 0.5, "BASE": 2.0, "*": 0.0}, list(UNET))
    assert {UNET[path]: weight for path, weight in by_name.items() if weight} == {
        "IN01": 0.25,
        "OUT02": 0.75,
        "MID": 0.5,
        "BASE": 2.0,
    }
    assert {count: len(names) for count, names in BLOCK_LISTS.items()} == {12: 12, 17: 17, 20: 20, 26: 26}


def test_a_list_may_speak_of_blocks_that_the_adapter_lacks_but_must_name_its_own() -> None:
    attention = [path for path in UNET if "attentions" in path]
    found = by_layer([float(i) for i in range(17)], attention)
    assert found["unet.up_blocks.3.attentions.2.proj_out"] == 16.0
    with pytest.raises(MergeError, match=r"says nothing of \d+ layers, such as 'unet.conv_in': they aren't in a U-Net's blocks"):
        by_layer([1.0] * 17, list(UNET))
    with pytest.raises(MergeError, match="a list of 3 numbers; kohya's block weights are 12, 17, 20, 26"):
        by_layer([1.0, 2.0, 3.0])


def test_what_is_refused() -> None:
    for weights, message in (
        ({"mpl": 1.0, "*": 0.5}, r"names 'mpl', which matches no layer of the adapter \(did you mean 'mlp'\?\)"),
        ({"mlp": 1.0}, r"says nothing of 10 layers, such as 'model.layers.0.self_attn.q_proj': add a last part '\*'"),
        ({"*": 1.0, "mlp": 0.5}, "leaves nothing for 'mlp': earlier parts match all its layers, and the first that matches"),
        ({"layers.11-0": 1.0, "*": 0.5}, "names 'layers.11-0', which matches no layer"),
        ({"re:(": 1.0}, r"'re:\(' is no regular expression"),
        ({"mlp": "0.5"}, "the weight of adapter 0 for 'mlp' should be a number, got '0.5'"),
        ({"mlp": float("nan")}, "for 'mlp' should be a number, got nan"),
        ({}, "names no part"),
        ({3: 1.0}, "expected names of parts, got 3"),
        ("mlp=1", "should be a number, got 'mlp=1'"),
    ):
        with pytest.raises(MergeError, match=message):
            by_layer(weights)


@pytest.mark.parametrize("weights", [0.7, -2.0, {"model.layers.0-11": 0.2, "mlp": 0.8, "*": 0.5}, [1.0] * 17])
def test_text_and_back(weights: Any) -> None:
    assert from_text(as_text(weights)) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [("x", "'x' is no number"), ("mlp=", "'' is no number"), ("=1", "should be PART=NUMBER"), ("a=1,b", "'b' should be PART"),
     ("a=1,a=2", "'a' has two weights"), ("", "expected a number"), ("nan", "should be a number")],
)  # fmt: skip
def test_text_that_is_no_weight(text: str, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        from_text(text)


def test_combine_takes_them(make_llama: Callable[..., LlamaForCausalLM], make_adapter: Callable[..., Adapter]) -> None:
    model = make_llama()
    one, other = make_adapter(model, seed=1), make_adapter(model, ("down_proj",), seed=2)
    combined = combine([(one, {"layers.0": 2.0, "q_proj": 0.0, "*": -1.0}), (other, 0.5)])
    for path, layer in combined.layers.items():
        mine = 2.0 if ".0." in path else 0.0 if "q_proj" in path else -1.0
        expected = mine * one.layers[path].delta()
        if path in other.layers:
            expected = expected + 0.5 * other.layers[path].delta()
        assert (layer.delta() - expected).abs().max() < 1e-5
    assert combined.metadata["combine.weights"] == "layers.0=2,q_proj=0,*=-1 0.5"
    with pytest.raises(MergeError, match="the weight of adapter 1 names 'q_proj', which matches no layer"):
        combine([(one, 1.0), (other, {"q_proj": 1.0, "*": 0.0})])
