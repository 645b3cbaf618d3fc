"""The bank under other people's loops: a plain one, transformers' Trainer and pipeline, TRL's SFTTrainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from lorabank import BASE, Adapter, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.errors import UnreachedLayerError
from tests.bank.tiny import VOCABULARY, fill, llama, state_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"
RECOMPUTING = [False, {"use_reentrant": False}, {"use_reentrant": True}]


def test_a_plain_loop_of_40_lines_trains_two_adapters_on_a_module_of_ones_own() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(steps=1), example.main(steps=300)
    assert after["double"] < 0.05 * before["double"]
    assert after["flip"] < 0.5 * before["flip"]
    assert after["base"] > 0.3  # nothing was learned there


def _tokenizer(words: int = VOCABULARY - 3) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2, hidden_size=32, pad_token_id=0, eos_token_id=1)
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)  # a head of transformers' initial size can't say much
    return model


def _bank(model: LlamaForCausalLM, targets: str | list[str] = "all-linear") -> AdapterBank:
    bank = attach(model)
    bank.add("only", AdapterConfig(rank=8, alpha=32, targets=targets))
    return bank


def _rows(count: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        start = int(torch.randint(0, 20, (1,), generator=generator))
        tokens = [3 + start + i for i in range(8)]  # counting upwards
        rows.append({"input_ids": tokens, "attention_mask": [1] * 8, "labels": tokens})
    return rows


def _texts() -> Dataset:
    starts = torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"text": " ".join(f"w{start + i}" for i in range(8))} for start in starts])


def _arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "learning_rate": 2e-2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "seed": 0,
    } | changes


def _recompute(how: bool | dict[str, Any]) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how} if isinstance(how, dict) else {}


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("how", RECOMPUTING)
def test_transformers_trainer_trains_a_one_adapter_bank(tmp_path: Path, how: bool | dict[str, Any], use: bool) -> None:
    model = _model()
    base = state_bytes(model)
    bank = _bank(model)
    if use:
        bank.use("only")
    start = [p.detach().clone() for p in bank.parameters("only")]
    arguments = TrainingArguments(**_arguments(tmp_path, gradient_accumulation_steps=2, **_recompute(how)))
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(_rows()))
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < 0.75 * losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(bank.parameters("only"), start, strict=True))
    assert state_bytes(model) == base, "the base is frozen"
    assert trainer.optimizer is not None
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in bank.parameters("only")}
    assert all(p.grad is None for p in model.parameters()), "zero_grad reaches the leaves"
    assert any(group["weight_decay"] > 0 for group in trainer.optimizer.param_groups)
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)


def test_trainers_gradients_are_the_plain_loops(tmp_path: Path) -> None:
    """Clipping included: one step of SGD under Trainer against the same step by hand."""
    stepped = []
    rows = _rows(8)
    for by_hand in (True, False):
        model = _model().eval()
        bank = _bank(model)
        fill(bank, "only")
        optimizer = torch.optim.SGD(bank.parameters("only"), lr=0.1)
        if by_hand:
            batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(bank.parameters("only"), 0.05)
            optimizer.step()
        else:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
            arguments = TrainingArguments(**_arguments(tmp_path, max_steps=1, max_grad_norm=0.05))
            Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), optimizers=(optimizer, schedule)).train()
        stepped.append([p.detach().clone() for p in bank.parameters("only")])
    for hand, theirs in zip(*stepped, strict=True):
        torch.testing.assert_close(theirs, hand, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_trainer_saves_is_the_base_and_what_the_bank_saves_is_the_adapter(tmp_path: Path) -> None:
    model = _model()
    base = state_bytes(model)
    bank = _bank(model)
    arguments = TrainingArguments(**_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(_rows()))
    trainer.train()
    written = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not [key for key in written if "lora" in key]
    assert state_bytes(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")) == base
    bank.adapter("only").save(tmp_path / "adapter")
    again = attach(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))
    again.load("only", Adapter.load(tmp_path / "adapter"))
    saved, loaded = dict(bank.named_parameters("only")), dict(again.named_parameters("only"))
    assert list(loaded) == list(saved), "in the model's order, so that an optimizer's state fits"
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.slow
@pytest.mark.parametrize("how", RECOMPUTING)
def test_trls_sft_trainer_trains_a_one_adapter_bank(tmp_path: Path, how: bool | dict[str, Any]) -> None:
    from trl import SFTConfig, SFTTrainer

    model = _model()
    base = state_bytes(model)
    bank = _bank(model)
    recompute = _recompute(how) or {"gradient_checkpointing": False}
    arguments = SFTConfig(**_arguments(tmp_path, max_length=32, bf16=False, **recompute))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=_texts(), processing_class=_tokenizer())
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < 0.75 * losses[0]
    assert state_bytes(model) == base
    assert all(p.requires_grad for p in bank.parameters("only"))


def test_trl_that_reads_the_heads_weight_past_an_adapted_head_is_noticed(tmp_path: Path) -> None:
    """TRL's loss multiplies with `lm_head.weight` itself, in chunks: an adapter there would do nothing."""
    from trl import SFTConfig, SFTTrainer

    model = _model()
    _bank(model, targets=["all-linear", "lm_head"])
    arguments = SFTConfig(**_arguments(tmp_path, max_length=32, bf16=False, max_steps=1, gradient_checkpointing=False))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=_texts(), processing_class=_tokenizer())
    with pytest.raises(UnreachedLayerError, match=r"never called 'lm_head'"):
        trainer.train()


def test_a_pipeline_generates_with_the_adapter_that_use_names() -> None:
    model, tokenizer = _model().eval(), _tokenizer()
    bank = _bank(model)
    bank.add("other", AdapterConfig(rank=4))
    for name in bank.names:
        fill(bank, name, size=1.0)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    said = {}
    for name in ("only", "other", BASE):
        bank.use(name)
        said[name] = generate("w1 w2 w3", return_tensors=True, **arguments)[0]["generated_token_ids"]
        with bank.route(name):
            prompt = tokenizer("w1 w2 w3", return_tensors="pt")
            assert model.generate(**prompt, **arguments)[0].tolist() == said[name]
    assert len({tuple(tokens) for tokens in said.values()}) == 3
    bank.use("only")
    batch = generate(["w1 w2 w3", "w9 w8 w7"], batch_size=2, return_tensors=True, **arguments)
    assert batch[0][0]["generated_token_ids"] == said["only"]
