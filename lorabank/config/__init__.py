"""Configuration: what a run is (`train.py`), how it is read (`parse.py`, `flags.py`), others' keys (`aliases.py`)."""

from lorabank.config.adapter import AdapterConfig
from lorabank.config.flags import TrainArguments, parse_train_arguments
from lorabank.config.from_peft import adapter_config_from_dict, adapter_config_from_peft
from lorabank.config.parse import config_from_dict, dump_yaml, load_config, to_dict
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, SaveConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "AdapterRun",
    "DataConfig",
    "EvalConfig",
    "SaveConfig",
    "TrainArguments",
    "TrainConfig",
    "adapter_config_from_dict",
    "adapter_config_from_peft",
    "config_from_dict",
    "dump_yaml",
    "load_config",
    "parse_train_arguments",
    "to_dict",
]
