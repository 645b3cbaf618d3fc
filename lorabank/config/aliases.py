"""Keys of other tools, and what they mean here: one table of translations, one of refusals, one of keys without effect.

`ALIASES` maps a foreign key to the setting that means the same, through a converter where the value differs.
`REFUSED` names keys whose meaning lorabank doesn't have, with the way out. `IGNORED` names keys that change nothing here.
Tools: PEFT, axolotl, kohya (sd-scripts), diffusers (its examples), HF (transformers' TrainingArguments), TRL, LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorabank.config import convert

Converter = Callable[[object], Mapping[str, object]]
"""From a foreign value to `{"section.field": value}`; raises ConfigError with the reason where no translation exists."""


@dataclass(frozen=True)
class Alias:
    """One foreign key."""

    to: str
    """`section.field`; sections are run, data, adapter, eval, save."""
    tool: str
    """Where the key comes from, for the note."""
    convert: Converter | None = None
    """None: the value means the same."""


ALIASES: dict[str, Alias] = {
    # what the adapter is
    "r": Alias("adapter.rank", "PEFT"),
    "lora_r": Alias("adapter.rank", "PEFT, axolotl"),
    "lora_rank": Alias("adapter.rank", "LLaMA-Factory"),
    "lora_dim": Alias("adapter.rank", "kohya"),
    "network_dim": Alias("adapter.rank", "kohya"),
    "lora_alpha": Alias("adapter.alpha", "PEFT, axolotl"),
    "network_alpha": Alias("adapter.alpha", "kohya"),
    "lora_dropout": Alias("adapter.dropout", "PEFT, axolotl"),
    "target_modules": Alias("adapter.targets", "PEFT", convert.peft_targets),
    "lora_target_modules": Alias("adapter.targets", "axolotl", convert.peft_targets),
    "lora_target": Alias("adapter.targets", "LLaMA-Factory", convert.factory_targets),
    "lora_target_linear": Alias("adapter.targets", "axolotl", convert.target_linear),
    "exclude_modules": Alias("adapter.exclude", "PEFT", convert.peft_exclude),
    "layers_to_transform": Alias("adapter.layers", "PEFT", convert.layers),
    "lora_layers_to_transform": Alias("adapter.layers", "axolotl", convert.layers),
    "init_lora_weights": Alias("adapter.init", "PEFT", convert.peft_init),
    "peft_init_lora_weights": Alias("adapter.init", "axolotl", convert.peft_init),
    "peft_use_rslora": Alias("adapter.use_rslora", "axolotl"),
    "use_rs_lora": Alias("adapter.use_rslora", "TRL"),
    "peft_use_dora": Alias("adapter.use_dora", "axolotl"),
    "lora_modules_to_save": Alias("adapter.modules_to_save", "axolotl"),
    "lora_model_dir": Alias("adapter.init_from", "axolotl"),
    "network_weights": Alias("adapter.init_from", "kohya"),
    # pictures
    "min_snr_gamma": Alias("diffusion.min_snr", "kohya"),
    "snr_gamma": Alias("diffusion.min_snr", "diffusers"),
    "caption_dropout_rate": Alias("diffusion.caption_dropout", "kohya"),
    "prior_loss_weight": Alias("diffusion.prior_weight", "kohya, diffusers"),
    "class_prompt": Alias("diffusion.prior_prompt", "diffusers"),
    "num_class_images": Alias("diffusion.prior_pictures", "diffusers"),
    "enable_bucket": Alias("diffusion.buckets", "kohya"),
    "bucket_reso_steps": Alias("diffusion.bucket_step", "kohya"),
    # how it is trained
    "lr": Alias("adapter.learning_rate", "axolotl"),
    "loraplus_lr_ratio": Alias("adapter.loraplus_ratio", "axolotl, PEFT"),
    "per_device_train_batch_size": Alias("adapter.batch_size", "HF"),
    "micro_batch_size": Alias("adapter.batch_size", "axolotl"),
    "train_batch_size": Alias("adapter.batch_size", "kohya"),
    "gradient_accumulation_steps": Alias("adapter.gradient_accumulation", "HF, axolotl, kohya"),
    "num_train_epochs": Alias("adapter.epochs", "HF"),
    "num_epochs": Alias("adapter.epochs", "axolotl"),
    "max_train_epochs": Alias("adapter.epochs", "kohya"),
    "max_train_steps": Alias("adapter.max_steps", "kohya"),
    "lr_scheduler_type": Alias("adapter.lr_scheduler", "HF", convert.schedule),
    "lr_warmup_steps": Alias("adapter.warmup_steps", "kohya", convert.warmup_steps),
    "optim": Alias("adapter.optimizer", "HF", convert.optimizer),
    "optimizer_type": Alias("adapter.optimizer", "kohya", convert.optimizer),
    "adam_beta1": Alias("adapter.beta1", "HF"),
    "adam_beta2": Alias("adapter.beta2", "HF"),
    "adam_epsilon": Alias("adapter.eps", "HF"),
    "early_stopping_patience": Alias("eval.early_stopping", "axolotl, HF"),
    # the run
    "base_model": Alias("run.model", "axolotl"),
    "model_name_or_path": Alias("run.model", "HF, TRL"),
    "pretrained_model_name_or_path": Alias("run.model", "kohya"),
    "model_name": Alias("run.model", "HF"),
    "output_dir": Alias("run.output", "HF, axolotl, kohya"),
    "bf16": Alias("run.base_dtype", "HF, axolotl", convert.bf16),
    "fp16": Alias("run.base_dtype", "HF, axolotl", convert.fp16),
    "torch_dtype": Alias("run.base_dtype", "HF", convert.dtype),
    "dtype": Alias("run.base_dtype", "HF, TRL", convert.dtype),
    "torch_compile": Alias("run.compile", "HF, axolotl", convert.torch_compile),
    "use_cpu": Alias("run.device", "HF", convert.use_cpu),
    "no_cuda": Alias("run.device", "HF", convert.use_cpu),
    # the rows
    "train_file": Alias("data.train", "HF"),
    "dataset_name": Alias("data.train", "TRL"),
    "validation_file": Alias("data.val", "HF"),
    "test_file": Alias("data.test", "HF"),
    "max_train_samples": Alias("data.limit", "HF"),
    "sequence_len": Alias("data.max_length", "axolotl"),
    "max_seq_length": Alias("data.max_length", "TRL"),
    "max_seq_len": Alias("data.max_length", "TRL"),
    "model_max_length": Alias("data.max_length", "HF"),
    "cutoff_len": Alias("data.max_length", "LLaMA-Factory"),
    "val_set_size": Alias("data.val_split", "axolotl"),
    "sample_packing": Alias("data.packing", "axolotl"),
    "train_on_inputs": Alias("data.train_on", "axolotl", convert.train_on_inputs),
    "completion_only_loss": Alias("data.train_on", "TRL", convert.completion_only),
    "assistant_only_loss": Alias("data.train_on", "TRL", convert.assistant_only),
    # evaluation and checkpoints
    "eval_steps": Alias("eval.every", "HF, axolotl", convert.eval_steps),
    "eval_strategy": Alias("eval.every", "HF, axolotl", convert.eval_strategy),
    "evaluation_strategy": Alias("eval.every", "HF", convert.eval_strategy),
    "per_device_eval_batch_size": Alias("eval.batch_size", "HF"),
    "eval_batch_size": Alias("eval.batch_size", "axolotl"),
    "max_eval_samples": Alias("eval.max_rows", "HF"),
    "save_steps": Alias("save.every", "HF, axolotl", convert.save_steps),
    "save_strategy": Alias("save.every", "HF", convert.save_strategy),
    "save_total_limit": Alias("save.keep", "HF, axolotl"),
}

OWN: dict[tuple[str, str], Converter] = {
    # keys that have our name, and in other tools also values that ours don't have
    ("adapter", "max_steps"): convert.max_steps,
    ("adapter", "warmup_steps"): convert.warmup_steps,
    ("adapter", "optimizer"): convert.optimizer,
    ("adapter", "lr_scheduler"): convert.own_schedule,
    ("run", "base_dtype"): convert.dtype,
    ("run", "report_to"): convert.report_to,
}

_FOUR_BIT = "a quantised base is asked for as `base_dtype: nf4` (4 bits, for memory) or `base_dtype: fp8` (for speed)."
_EIGHT_BIT = "int8 is not supported yet. Use `base_dtype: fp8`, or `base_dtype: nf4` for less memory."
_DISTRIBUTED = "training over several devices is not supported yet. Leave it out."
_HUB = "uploading is not supported yet. Leave it out; the adapter folder can be uploaded as it is."

REFUSED: dict[str, str] = {
    # a value that is false, null, zero or empty switches the feature off, and passes
    "datasets": "axolotl's list of datasets has no single meaning here. Name the file: `data: {train: FILE}` (chat, "
    "prompt/completion, Alpaca and ShareGPT rows are recognised), and give each adapter its own `data` if they differ.",
    "test_datasets": "name the file: `data: {val: FILE}`.",
    "load_in_4bit": _FOUR_BIT,
    "load_in_8bit": _EIGHT_BIT,
    "quantization_config": _FOUR_BIT,
    "network_dropout": "kohya drops the output of the down projection, lorabank's `dropout` its input: they are different "
    "regularisers. Use `dropout` (about the same strength) if that is what you want.",
    "rank_dropout": "not supported. `dropout` drops inputs of the adapter.",
    "module_dropout": "not supported. `dropout` drops inputs of the adapter.",
    "scale_weight_norms": "not supported. `weight_decay` or a lower learning rate keeps weights small.",
    "network_args": "LyCORIS and convolution options are not supported yet.",
    "conv_dim": "convolution adapters are not supported yet.",
    "unet_lr": "diffusion models are not supported yet.",
    "text_encoder_lr": "diffusion models are not supported yet.",
    "layers_pattern": "name the blocks with `layers: [0, 1, …]`, or the modules with `targets: 're:…'`.",
    "target_parameters": "stacked experts are named like layers here: put their names into targets.",
    "layer_replication": "replicated layers are not supported.",
    "loraplus_lr_embedding": "embeddings are not adapted.",
    "lora_fan_in_fan_out": "the orientation is taken from the layer itself. Leave it out.",
    "relora_steps": "ReLoRA is not supported.",
    "eval_on_start": "the base is always evaluated at the start. Leave it out.",
    "evals_per_epoch": "`eval: {every: N}` counts forward passes of the whole run, since adapters have epochs of their own.",
    "saves_per_epoch": "`save: {every: N}` counts forward passes of the whole run, since adapters have epochs of their own.",
    "neftune_noise_alpha": "NEFTune is not supported.",
    "label_smoothing_factor": "label smoothing is not supported.",
    "chat_template": "the model's own chat template is used. Change it in the tokenizer's folder.",
    "dataset_text_field": "the column of plain text is called `text`. Rename yours, or give `prompt` and `completion` templates.",
    "special_tokens": "the vocabulary of the base isn't changed. Leave it out.",
    "deepspeed": _DISTRIBUTED,
    "fsdp": _DISTRIBUTED,
    "fsdp_config": _DISTRIBUTED,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "resume_from_checkpoint": "resuming is a flag: `lorabank train FOLDER --resume`.",
    "overwrite_output_dir": "a run is never overwritten. Choose another `output`, or remove the folder yourself.",
    "auto_find_batch_size": "not supported. Lower `batch_size` and raise `gradient_accumulation`.",
    "data_seed": "one `seed` drives initialisation, data order and dropout; an adapter may have its own.",
    "wandb_project": "set the environment variable WANDB_PROJECT, and `report_to: [wandb]`.",
    "wandb_entity": "set the environment variable WANDB_ENTITY, and `report_to: [wandb]`.",
    "run_name": "a run is called like its output folder. Choose `output`.",
    "peft_config": "write its keys themselves (`rank`, `alpha`, `targets`, …) under `defaults` or an adapter.",
}

IGNORED: dict[str, str] = {
    "peft_type": "lorabank trains LoRA",
    "finetuning_type": "lorabank trains LoRA",
    "network_module": "lorabank trains LoRA",
    "fan_in_fan_out": "the orientation is taken from the layer itself",
    "inference_mode": "training is what a run does",
    "do_train": "training is what `lorabank train` does",
    "do_eval": "`eval.every` says when",
    "logging_steps": "every step is recorded in metrics.jsonl",
    "logging_strategy": "every step is recorded in metrics.jsonl",
    "logging_first_step": "every step is recorded in metrics.jsonl",
    "logging_dir": "records go into the run folder",
    "load_best_model_at_end": "an adapter's folder always holds its best step, `last/` its last one",
    "greater_is_better": "the best step is the one of the lowest validation loss",
    "group_by_length": "batches are always bucketed by length",
    "remove_unused_columns": "columns that aren't used are left alone",
    "dataset_num_proc": "rows are read in one process",
    "dataloader_num_workers": "rows are read in one process",
    "dataloader_pin_memory": "batches are small",
    "preprocessing_num_workers": "rows are read in one process",
    "flash_attention": "attention is chosen by transformers",
    "attn_implementation": "attention is chosen by transformers",
    "gradient_checkpointing_kwargs": "checkpointing is non-reentrant",
    "tf32": "matrix products keep torch's setting",
    "strict": "unknown keys are always refused",
    "model_type": "the class is read from the model's own configuration",
    "tokenizer_type": "the class is read from the model's own configuration",
    "peft_version": "a version changes no value",
    "auto_mapping": "the class is read from the model's own configuration",
}

MOVED: dict[tuple[str, str], str] = {
    ("images", "bad_rows"): "data.bad_rows",
    ("speech", "bad_rows"): "data.bad_rows",
    ("synthesis", "bad_rows"): "data.bad_rows",
    ("detection", "bad_pictures"): "data.bad_rows",
    ("diffusion", "bad_pictures"): "data.bad_rows",
}
"""Section and name that a setting of ours once had, to where it is now."""

CHECKED: dict[str, Converter] = {
    # keys that have one value we can follow: they set nothing, and any other value is an error with its reason
    "adapter": convert.check_adapter_kind,
    "metric_for_best_model": convert.check_best_metric,
    "rl": convert.check_off,
    "task_type": convert.check_task_type,
}
