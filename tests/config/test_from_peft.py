"""A real peft.LoraConfig in our words: the same mathematics, or a refusal by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import peft
import pytest

from lorabank.config.adapter import AdapterConfig
from lorabank.config.from_peft import PASSED, SILENT, adapter_config_from_dict, adapter_config_from_peft
from lorabank.errors import ConfigError


def test_a_lora_config() -> None:
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["lm_head"],
        lora_dropout=0.1,
        use_rslora=True,
        use_dora=True,
        init_lora_weights="gaussian",
        layers_to_transform=[0, 1],
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 2},
        task_type="CAUSAL_LM",
    )
    found = adapter_config_from_peft(config)
    assert found == AdapterConfig(
        rank=8,
        alpha=16,
        targets=tuple(sorted(("q_proj", "v_proj"))),
        exclude=("lm_head",),
        dropout=0.1,
        use_rslora=True,
        use_dora=True,
        init="gaussian",
        layers=(0, 1),
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 2},
    )
    assert adapter_config_from_peft(config.to_dict()) == found


def test_pefts_defaults_are_kept_not_ours() -> None:
    found = adapter_config_from_peft(peft.LoraConfig(target_modules="all-linear"))
    assert (found.rank, found.alpha, found.targets, found.init) == (8, 8.0, "all-linear", "uniform")


def test_names_that_are_roles_here_stay_names() -> None:
    assert adapter_config_from_peft(peft.LoraConfig(target_modules=["v"])).targets == (r"re:^(?:.*\.)?v$",)
    assert adapter_config_from_peft(peft.LoraConfig(target_modules=r".*\.mlp\..*")).targets == r"re:^(?:.*\.mlp\..*)$"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": None}, "target_modules"),
    ({"init_lora_weights": "corda"}, "init_lora_weights"),
    ({"init_lora_weights": False}, "init_lora_weights"),
    ({"trainable_token_indices": [1, 1]}, "trainable_token_indices"),
    ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices"),
    ({"bias": "boft_only"}, "bias"),
    ({"layer_replication": [(0, 1)]}, "layer_replication"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern"),
]


@pytest.mark.parametrize("task", ["SEQ_CLS", peft.TaskType.TOKEN_CLS, "QUESTION_ANS"])
def test_a_classifiers_task_type_leaves_its_head_to_the_bank(task: Any) -> None:
    """PEFT adds the head by task type, the bank by the model's class."""
    found = adapter_config_from_peft(peft.LoraConfig(target_modules=["query"], task_type=task))
    assert found.modules_to_save is None
    named = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler"], task_type=task)
    assert adapter_config_from_peft(named).modules_to_save == ("pooler",)


def test_biases_and_token_rows_keep_pefts_names() -> None:
    found = adapter_config_from_peft(
        peft.LoraConfig(target_modules=["v"], bias="lora_only", lora_bias=True, trainable_token_indices={"embed_tokens": [7, 3]})
    )
    assert (found.bias, found.lora_bias, found.trainable_token_indices) == ("lora_only", True, {"embed_tokens": (7, 3)})
    assert adapter_config_from_peft(peft.LoraConfig(trainable_token_indices=[7, 3], target_modules=["v"])) == AdapterConfig(
        rank=8, alpha=8, targets=(r"re:^(?:.*\.)?v$",), trainable_token_indices=(7, 3)
    )


def test_stacked_parameters_are_targets_beside_modules() -> None:
    both = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    assert adapter_config_from_peft(both).targets == ("q_proj", "experts.down_proj")
    alone = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    assert adapter_config_from_peft(alone).targets == ("experts.down_proj",)


@pytest.mark.parametrize(("arguments", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_what_changes_the_mathematics_is_refused_by_name(arguments: dict[str, Any], name: str) -> None:
    raw = peft.LoraConfig(target_modules=["q_proj"]).to_dict() | arguments
    with pytest.raises(ConfigError, match=f"LoraConfig.{name}"):
        adapter_config_from_peft(raw)


def test_every_field_of_the_installed_peft_is_decided() -> None:
    neutral = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    for item in fields(peft.LoraConfig):
        if item.name in SILENT | PASSED:
            continue
        with pytest.raises(ConfigError, match=f"LoraConfig.{item.name}"):  # unknown to us: never dropped in silence
            adapter_config_from_peft(neutral | {item.name: "something"})


def test_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected LORA, got IA3"):
        adapter_config_from_peft(peft.IA3Config(target_modules=["q"], feedforward_modules=["q"]))


def test_from_a_dict() -> None:
    assert adapter_config_from_dict({"rank": 4, "lora_alpha": 8, "targets": ["q"]}) == AdapterConfig(
        rank=4, alpha=8, targets=("q",)
    )
    with pytest.raises(ConfigError, match=r"^rnak: unknown setting \(did you mean 'rank'\?\)"):
        adapter_config_from_dict({"rnak": 4})
    with pytest.raises(ConfigError, match=r"^learning_rate: says how an adapter is trained"):
        adapter_config_from_dict({"learning_rate": 4})
    with pytest.raises(ConfigError, match=r"^rank: expected a whole number"):
        adapter_config_from_dict({"rank": "x"})
