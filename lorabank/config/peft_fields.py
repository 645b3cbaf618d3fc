"""The fields of a `peft.LoraConfig`, and what each is to us: one table for adapter files and for configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


class Role(Enum):
    """What becomes of a field, in an adapter file that is loaded and in a configuration that is trained from."""

    SETTING = auto()
    """Becomes a field of our values, in both."""
    ABOUT = auto()
    """Says what the file is: read and checked there, no setting in a configuration."""
    NOTE = auto()
    """Changes nothing in either; a file's metadata keeps it."""
    TRAINING = auto()
    """Changes how an adapter starts or trains, not ΔW once it is trained: kept with a file, refused in a configuration."""
    REFUSED = auto()
    """Changes what an adapter computes, and isn't supported yet: refused in both."""


@dataclass(frozen=True)
class PeftField:
    """One field."""

    role: Role
    feature: str = ""
    """Name of what isn't supported yet; of refused fields only."""


def _fields(role: Role, names: str) -> dict[str, PeftField]:
    return {name: PeftField(role) for name in names.split()}


def _refused(**features: str) -> dict[str, PeftField]:
    return {name: PeftField(Role.REFUSED, feature) for name, feature in features.items()}


PEFT_FIELDS: Mapping[str, PeftField] = {
    **_fields(
        Role.SETTING,
        "r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern use_rslora use_dora "
        "init_lora_weights layers_to_transform bias target_parameters "
        "ensure_weight_tying modules_to_save lora_bias trainable_token_indices",
    ),
    **_fields(Role.ABOUT, "peft_type task_type base_model_name_or_path"),
    **_fields(
        Role.NOTE,
        "auto_mapping peft_version revision inference_mode fan_in_fan_out megatron_core qalora_group_size runtime_config "
        "merge_weights",  # of PEFT 0.1 and 0.2, which merged in evaluation; files held A and B
    ),
    **_fields(
        Role.TRAINING,
        "layers_pattern loftq_config eva_config corda_config lora_ga_config velora_config",
    ),
    **_refused(
        enable_lora="a change of parts of a fused layer (PEFT 0.1 and 0.2)",
        layer_replication="replicated layers",
        alora_invocation_tokens="activated LoRA (aLoRA)",
        use_qalora="QALoRA",
        use_bdlora="block-diagonal LoRA",
        arrow_config="Arrow routing",
        kasa_config="KaSA",
        monteclora_config="MonteCLoRA",
        megatron_config="Megatron's parallel layers",
    ),
}


def with_role(*roles: Role) -> frozenset[str]:
    """Names of the fields that have one of these roles."""
    return frozenset(name for name, field in PEFT_FIELDS.items() if field.role in roles)
