"""`SaveAdapterCallback` with transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import lorabank as lb
from tests.training.tiny import tiny_rows


def test_the_trainer_leaves_adapters(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bank = lb.attach(model)
    bank.add("formal", lb.AdapterConfig(rank=4))
    bank.add("idle", lb.AdapterConfig(rank=2))
    bank.use("formal")
    texts = [row["completion"] for row in tiny_rows(8)]
    ids = [tokenizer(text, padding="max_length", max_length=16)["input_ids"] for text in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids],  # type: ignore[arg-type]
        callbacks=[lb.SaveAdapterCallback(bank, "formal")],
    )
    trainer.train()
    at_two, at_four = (lb.Adapter.load(tmp_path / f"checkpoint-{step}" / "formal") for step in (2, 4))
    end = lb.Adapter.load(tmp_path / "formal")
    path = next(iter(end.layers))
    assert not torch.equal(at_two.layers[path].B, end.layers[path].B)
    assert torch.equal(at_four.layers[path].B, end.layers[path].B)
    assert torch.equal(bank.adapter("formal").layers[path].B, end.layers[path].B)
    assert not (tmp_path / "idle").exists()
