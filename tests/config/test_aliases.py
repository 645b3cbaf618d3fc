"""Other tools' keys: each is translated to the same meaning, refused with its reason, or said to have no effect."""

from __future__ import annotations

from dataclasses import fields

import pytest

from lorabank.config import aliases
from lorabank.config.parse import config_from_dict
from lorabank.config.translate import SECTIONS
from lorabank.errors import ConfigError

EXAMPLES: dict[str, tuple[object, str, object]] = {
    # key: (foreign value, our place, our value); one for every alias whose value changes, and the most used others
    "lora_r": (8, "defaults.rank", 8),
    "r": (8, "defaults.rank", 8),
    "network_dim": (8, "defaults.rank", 8),
    "lora_alpha": (16, "defaults.alpha", 16.0),
    "network_alpha": ("1e1", "defaults.alpha", 10.0),
    "lora_dropout": (0.1, "defaults.dropout", 0.1),
    "target_modules": (["q_proj", "v"], "defaults.targets", ("q_proj", r"re:^(?:.*\.)?v$")),
    "lora_target_modules": ("all-linear", "defaults.targets", "all-linear"),
    "lora_target": ("all", "defaults.targets", "all-linear"),
    "lora_target_linear": (True, "defaults.targets", "all-linear"),
    "exclude_modules": (["lm_head"], "defaults.exclude", ("lm_head",)),
    "layers_to_transform": (3, "defaults.layers", (3,)),
    "lora_layers_to_transform": ([1, 2], "defaults.layers", (1, 2)),
    "init_lora_weights": ("gaussian", "defaults.init", "gaussian"),
    "peft_init_lora_weights": (True, "defaults.init", "uniform"),
    "peft_use_rslora": (True, "defaults.use_rslora", True),
    "loraplus_lr_ratio": (16, "defaults.loraplus_ratio", 16.0),
    "per_device_train_batch_size": (4, "defaults.batch_size", 4),
    "micro_batch_size": (4, "defaults.batch_size", 4),
    "gradient_accumulation_steps": (4, "defaults.gradient_accumulation", 4),
    "num_train_epochs": (3, "defaults.epochs", 3.0),
    "num_epochs": (3, "defaults.epochs", 3.0),
    "lr_scheduler_type": ("constant_with_warmup", "defaults.lr_scheduler", "constant"),
    "lr_warmup_steps": (0.1, "defaults.warmup_ratio", 0.1),
    "optim": ("adamw_torch_fused", "defaults.optimizer", "adamw"),
    "optimizer_type": ("Lion", "defaults.optimizer", "lion"),
    "adam_beta1": (0.8, "defaults.betas", (0.8, 0.999)),
    "adam_beta2": (0.95, "defaults.betas", (0.9, 0.95)),
    "adam_epsilon": ("1e-6", "defaults.eps", 1e-6),
    "early_stopping_patience": (2, "eval.early_stopping", 2),
    "base_model": ("m", "model", "m"),
    "output_dir": ("o", "output", "o"),
    "bf16": (True, "base_dtype", "bf16"),
    "fp16": (True, "base_dtype", "fp16"),
    "torch_dtype": ("bfloat16", "base_dtype", "bf16"),
    "dtype": ("float32", "base_dtype", "fp32"),
    "torch_compile": ("auto", "compile", None),
    "use_cpu": (True, "device", "cpu"),
    "no_cuda": (True, "device", "cpu"),
    "sequence_len": (512, "data.max_length", 512),
    "max_seq_length": (512, "data.max_length", 512),
    "val_set_size": (0.1, "data.val_split", 0.1),
    "train_on_inputs": (True, "data.train_on", "all"),
    "completion_only_loss": (True, "data.train_on", "completion"),
    "assistant_only_loss": (False, "data.train_on", "all"),
    "eval_steps": (50, "eval.every", 50),
    "eval_strategy": ("no", "eval.every", 0),
    "evaluation_strategy": ("no", "eval.every", 0),
    "save_steps": (50, "save.every", 50),
    "save_strategy": ("no", "save.every", 0),
    "save_total_limit": (3, "save.keep", 3),
}


def test_every_alias_leads_to_a_setting() -> None:
    for key, alias in aliases.ALIASES.items():
        section, _, name = alias.to.partition(".")
        names = {item.name for item in fields(SECTIONS[section])} | {"beta1", "beta2"}
        assert name in names, key
    tables = [set(aliases.ALIASES), set(aliases.REFUSED), set(aliases.IGNORED), set(aliases.CHECKED)]
    assert sum(map(len, tables)) == len(set.union(*tables)), "a key stands in two tables"


def test_every_converted_alias_has_an_example() -> None:
    assert {key for key, alias in aliases.ALIASES.items() if alias.convert} <= set(EXAMPLES)


@pytest.mark.parametrize("key", EXAMPLES)
def test_a_key_is_translated_with_a_note(key: str) -> None:
    value, place, expected = EXAMPLES[key]
    config, notes = config_from_dict({key: value})
    found = config
    for part in place.split("."):
        found = getattr(found, part)
    assert found == expected
    assert any(note.startswith(f"{key} (") for note in notes)


def test_keys_work_inside_an_adapter_and_in_their_section_only() -> None:
    config, notes = config_from_dict({"adapters": {"a": {"lora_r": 4, "lora_alpha": 8}}})
    assert (config.adapters["a"].rank, config.adapters["a"].alpha) == (4, 8.0)
    assert notes[0] == "adapters.a.lora_r (PEFT, axolotl): read as adapters.a.rank = 4"
    with pytest.raises(ConfigError, match=r"adapters\.a\.sequence_len: belongs to `data\.max_length`"):
        config_from_dict({"adapters": {"a": {"sequence_len": 4}}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"datasets": [{"path": "x"}]}, "datasets: axolotl's list"),
        ({"adapter": "qlora"}, "adapter: 'qlora': a quantised base is asked for as `base_dtype: nf4`"),
        ({"load_in_4bit": True}, "load_in_4bit: a quantised base is asked for as `base_dtype: nf4`"),
        ({"load_in_8bit": True}, "load_in_8bit: int8 is not supported yet. Use `base_dtype: fp8`"),
        ({"network_dropout": 0.1}, "network_dropout: kohya drops the output of the down projection"),
        ({"optim": "paged_adamw_8bit"}, "optim: 'paged_adamw_8bit'"),
        ({"optimizer": "adamw_bnb_8bit"}, "optimizer: 'adamw_bnb_8bit'"),
        ({"lr_scheduler_type": "polynomial"}, "the schedule 'polynomial' is not supported"),
        ({"lr_scheduler": "cosine_with_restarts"}, "is not supported. There are constant, linear and cosine"),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights: 'corda' is not supported. There are true, gaussian, orthogonal, pissa",
        ),
        ({"init_lora_weights": False}, "would change the model before training"),
        ({"eval_steps": 0.1}, "eval_steps: a share of the run"),
        ({"save_strategy": "epoch"}, "save_strategy: 'epoch' is not supported"),
        ({"report_to": "all"}, "Name the trackers"),
        ({"resume_from_checkpoint": "x"}, "--resume"),
        ({"metric_for_best_model": "bleu"}, "lowest validation loss"),
        ({"rl": "dpo"}, "only supervised training"),
        ({"task_type": "SEQ_CLS"}, "head in full"),
        ({"lora_r": 8, "rank": 4}, "both set defaults.rank"),
        ({"lora_r": 8, "defaults": {"rank": 4}}, "both set defaults.rank"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 10}, "both set defaults.warmup_steps"),
        ({"micro_batch_size": 2, "batch_size": 8}, "both set defaults.batch_size"),
        ({"adam_beta1": 0.8, "betas": [0.9, 0.99]}, "both set betas"),
    ],
)
def test_another_meaning_is_refused_by_name(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", aliases.REFUSED)
def test_a_refused_key_that_is_off_passes_and_on_doesnt(key: str) -> None:
    config_from_dict({key: False})
    config_from_dict({key: None})
    with pytest.raises(ConfigError, match=f"^{key}: "):
        config_from_dict({key: "something"})


@pytest.mark.parametrize("key", aliases.IGNORED)
def test_a_key_without_effect_is_said(key: str) -> None:
    base, _ = config_from_dict({})
    config, notes = config_from_dict({key: "x"})
    assert config == base
    assert notes[0].startswith(f"{key}: has no effect, since")


def test_steps_become_passes() -> None:
    config, notes = config_from_dict({"save_steps": 100, "gradient_accumulation_steps": 4})
    assert config.save.every == 400
    assert "save.every: 100 optimizer steps, which is 400 forward passes" in notes
    with pytest.raises(ConfigError, match="differ between adapters"):
        config_from_dict({"save_steps": 100, "adapters": {"a": {"gradient_accumulation": 2}, "b": {}}})


def test_constant_has_no_warmup_in_transformers() -> None:
    config, _ = config_from_dict({"lr_scheduler_type": "constant"})
    assert (config.defaults.lr_scheduler, config.defaults.warmup_steps) == ("constant", 0)
    assert config_from_dict({"lr_scheduler": "constant"})[0].defaults.warmup_steps is None


def test_minus_one_is_no_limit() -> None:
    assert config_from_dict({"max_steps": -1})[0].defaults.max_steps is None


def test_a_foreign_rank_without_alpha_is_noted() -> None:
    assert any("PEFT would use 8" in note for note in config_from_dict({"lora_r": 8})[1])
    assert not any("would use" in note for note in config_from_dict({"lora_r": 8, "lora_alpha": 16})[1])
    assert any("kohya would use 1" in note for note in config_from_dict({"adapters": {"a": {"network_dim": 8}}})[1])
