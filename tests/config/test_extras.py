"""Biases and token rows as settings: in a file, by flags, one adapter at a time."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from lorabank.config.adapter import AdapterConfig
from lorabank.config.flags import parse_train_arguments
from lorabank.config.from_peft import adapter_config_from_dict
from lorabank.config.parse import config_from_dict, dump_yaml, load_config, to_dict
from lorabank.errors import ConfigError


@pytest.mark.parametrize("indices", [[5, 6], [7], {"embed_tokens": [5, 6]}, {"embed_tokens": [5], "lm_head": [8, 3]}])
def test_a_file_says_what_flags_and_values_say(indices: Any, tmp_path: Path) -> None:
    tree = {"model": "M", "data": "f", "defaults": {"bias": "all", "lora_bias": True, "trainable_token_indices": indices}}
    config, _ = config_from_dict(tree)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "run.yaml")[0] == config
    assert config_from_dict(to_dict(config))[0] == config
    wanted = AdapterConfig(bias="all", lora_bias=True, trainable_token_indices=indices)
    assert config.defaults.adapter_config() == wanted
    assert adapter_config_from_dict({"bias": "all", "lora_bias": True, "trainable_token_indices": indices}) == wanted
    kept = wanted.trainable_token_indices
    assert kept == (tuple(indices) if isinstance(indices, list) else {name: tuple(ids) for name, ids in indices.items()})


def test_flags() -> None:
    line = "--model M --data f --bias lora_only --lora-bias --trainable-token-indices 5,6 --adapter a,bias=none --adapter b"
    config = parse_train_arguments(shlex.split(line)).config
    assert config.adapters["b"].adapter_config() == AdapterConfig(
        bias="lora_only", lora_bias=True, trainable_token_indices=[5, 6]
    )
    assert config.adapters["a"].bias == "none"
    one = parse_train_arguments(shlex.split("--model M --data f --trainable-token-indices 5")).config
    assert one.defaults.trainable_token_indices == (5,)
    line = "--model M --data f --adapter 'a,trainable_token_indices={embed_tokens: [3, 4], lm_head: [5]},rank=2'"
    named = parse_train_arguments(shlex.split(line)).config.adapters["a"]
    assert named.trainable_token_indices == {"embed_tokens": (3, 4), "lm_head": (5,)}
    assert named.rank == 2
    with pytest.raises(ConfigError, match=r"--trainable-token-indices: expected names with lists"):
        parse_train_arguments(shlex.split("--model M --data f --trainable-token-indices '{embed_tokens: [3, 4'"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": "lora-only"}, r"defaults\.bias: expected one of none, all, lora_only, got 'lora-only'"),
        ({"trainable_token_indices": ["x"]}, r"defaults\.trainable_token_indices\[0\]: expected a whole number, got 'x'"),
        (
            {"trainable_token_indices": {"embed": ["x"]}},
            r"defaults\.trainable_token_indices\.embed\[0\]: expected a whole number",
        ),
        ({"trainable_token_indices": [4, 4]}, r"defaults\.trainable_token_indices: id 4 stands there twice"),
        ({"lora_bias": "maybe"}, r"defaults\.lora_bias: expected true or false, got 'maybe'"),
    ],
)
def test_wrong_values_are_named_where_they_stand(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"model": "M", "data": "f", "defaults": settings})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": 5}, "layers: expected a list of block indices ≥ 0, got 5"),
        ({"layers": [0, -1]}, r"layers: expected a list of block indices ≥ 0, got \(0, -1\)"),
        ({"rank_pattern": ["q"]}, "rank_pattern: expected module names with numbers, got"),
        ({"alpha_pattern": None}, "alpha_pattern: expected module names with numbers, got None"),
        ({"alpha": 10**400}, "alpha: expected a finite number, got 1000"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, got 'yes'"),
        ({"lora_bias": 1}, "lora_bias: expected true or false, got 1"),
    ],
)
def test_values_of_another_kind_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**given)
