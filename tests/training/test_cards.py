"""Model cards: valid front matter, real values, nothing that isn't known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lorabank import Adapter, AdapterConfig
from lorabank.config.train import AdapterRun
from lorabank.formats.adapter import AdapterLayer
from lorabank.training.card_use import how_to_load
from lorabank.training.cards import CardFacts, card_for_hub, model_card, write_card
from lorabank.training.serving import serve_lines

FACTS = CardFacts(
    name="terse",
    base_model="org/Tiny-135M",
    run=AdapterRun(rank=12, loraplus_ratio=16, targets=["q", "v"], gradient_accumulation=2),
    learning_rate=5.37e-4,
    parameters=4_880_000,
    base_parameters=134_515_008,
    layers=210,
    steps=150,
    best_step=100,
    train_rows=1600,
    val_rows=100,
    data="terse.jsonl",
    metrics={"loss": 1.05, "bleu": 33.2},
    base_metrics={"loss": 3.21, "bleu": 4.2},
)


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_what_would_end_a_cell_stays_inside_it() -> None:
    card = model_card(replace(FACTS, data="two\nlines | and a bar"))
    assert "| data | two lines \\| and a bar: 1,600 rows, 100 held out |" in card


def test_what_a_card_says(tmp_path: Path) -> None:
    card = write_card(tmp_path, FACTS).read_text(encoding="utf-8")
    assert front_matter(card) == {
        "base_model": "org/Tiny-135M",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorabank"],
    }
    for line in (
        "| rank | 12 |",
        "| targets | `q, v` |",
        "| batch | 8 rows × 2 accumulated |",
        "| optimizer | adamw, LoRA+ ratio 16 |",
        "| steps | 150, the best by validation is 100 |",
        "| data | terse.jsonl: 1,600 rows, 100 held out |",
        "| loss | 3.210 | 1.050 |",
        "| bleu | 4.2 | 33.2 |",
        'PeftModel.from_pretrained(model, "path/to/terse")',
        "vllm serve org/Tiny-135M --enable-lora --max-lora-rank 16 --lora-modules terse=path/to/terse",
    ):
        assert line in card


def test_no_nan_in_a_card_and_a_warning_above_all() -> None:
    card = model_card(replace(FACTS, metrics={"loss": float("nan"), "bleu": 3.0}, warning="Training stopped."))
    assert "nan" not in card.lower()
    assert "| loss | 3.210 | – |" in card
    assert "# terse\n\n**Training stopped.**\n" in card


def test_a_pattern_with_bars_stays_in_its_cell() -> None:
    said = model_card(replace(FACTS, run=AdapterRun(targets=r"re:(unet|transformer)\.to_q")))
    assert r"| targets | `re:(unet\|transformer)\.to_q` |" in said


@pytest.mark.parametrize("task", ["image-classification", "automatic-speech-recognition"])
def test_no_card_says_that_vllm_serves_what_it_does_not(task: str) -> None:
    head = "vLLM reads its head where it runs as a classifier"
    for unserved in (None, head):
        told = how_to_load("a", "org/base", 4, patterns=False, unserved=unserved, repository="me/a", task=task)
        assert f"adapters for {task} were never checked there." in told and head not in told and "vllm serve" not in told


def test_what_is_not_known_is_left_out() -> None:
    card = model_card(replace(FACTS, metrics={}, base_metrics={}))
    assert "Evaluation" not in card
    assert "license" not in card
    assert "tokens" not in card
    assert "| loss | 1.050 |" in model_card(replace(FACTS, base_metrics={}))
    known = model_card(replace(FACTS, license="apache-2.0", tokens_seen=12345))
    assert front_matter(known)["license"] == "apache-2.0"
    assert "| trained tokens | 12,345 |" in known


def test_no_vllm_line_for_a_rank_that_vllm_refuses() -> None:
    card = model_card(replace(FACTS, run=AdapterRun(rank=1024)))
    assert "vllm serve" not in card
    assert "vLLM can't read this adapter" in card


def test_no_vllm_line_for_dora() -> None:
    card = model_card(replace(FACTS, run=AdapterRun(use_dora=True)))
    assert "vllm serve" not in card
    assert "vLLM doesn't read DoRA; merge it (lorabank merge)" in card


@pytest.mark.parametrize(
    "run, said, why",
    [
        (
            AdapterRun(modules_to_save=["lm_head"]),
            "`modules_to_save`: lm_head",
            "vLLM reads no modules that were trained in full",
        ),
        (AdapterRun(bias="all", lora_bias=True), "`bias: all`, `lora_bias`", "vLLM reads no trained biases or token rows"),
        (AdapterRun(trainable_token_indices={"wte": [3, 4]}), "2 token rows", "vLLM reads no trained biases or token rows"),
    ],
)
def test_what_is_trained_beside_a_and_b_is_said_and_no_vllm_line(run: AdapterRun, said: str, why: str) -> None:
    card = model_card(replace(FACTS, run=run))
    assert f"| also trained | {said} |" in card
    assert "vllm serve" not in card
    assert why in card


def test_where_the_adapter_started_is_said_and_what_only_the_file_knows() -> None:
    assert "| start | pissa |" in model_card(replace(FACTS, run=AdapterRun(init="pissa")))
    assert "start" not in model_card(FACTS)
    card = model_card(replace(FACTS, unserved="vLLM reads experts one by one; export it"))
    assert "as it is: vLLM reads experts one by one; export it." in card
    assert "vllm serve" not in card


def test_a_finished_run_gives_no_line_that_vllm_refuses(tmp_path: Path) -> None:
    for name, more in (
        ("head", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("experts", {"target_parameters": ["mlp.experts.down_proj"]}),
    ):
        (tmp_path / name).mkdir()
        settings = {"r": 4, "bias": "none", **more}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    title, lines = serve_lines("base", {name: str(tmp_path / name) for name in ("head", "gpt2", "experts")})
    assert title == "vLLM can't serve these adapters as they are:"
    assert [line.partition(";")[0] for line in lines] == [
        "head: vLLM reads no modules that were trained in full (modules_to_save)",
        "gpt2: vLLM takes no adapters for GPT-2",
        "experts: vLLM reads experts one by one",
    ]


def test_a_trained_head_needs_vllm_to_run_as_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "mood").mkdir()
    settings = {"r": 4, "bias": "none", "modules_to_save": ["score"]}
    (tmp_path / "mood" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    _, lines = serve_lines("base", {"mood": str(tmp_path / "mood")})
    assert lines == [
        "mood: vLLM reads its head where it runs as a classifier; "
        "add --runner pooling --convert classify --max-lora-cls-labels LABELS"
    ]


def test_a_classifiers_card_names_its_class_and_no_vllm_line() -> None:
    layer = AdapterLayer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    adapter = Adapter(
        config=AdapterConfig(rank=2, targets=["q"]),
        layers={"encoder.q": layer},
        modules={"classifier": {"weight": torch.zeros(2, 4)}},
        task_type="SEQ_CLS",
    )
    card = card_for_hub(None, adapter, "mood", base_model="org/base", repository="me/mood", revision=None)
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card
    assert "vllm serve" not in card


@pytest.mark.parametrize("run", [AdapterRun(rank_pattern={"q": 4}), AdapterRun(alpha_pattern={"q": 4})])
def test_ranks_that_differ_between_layers_need_a_new_vllm(run: AdapterRun) -> None:
    card = model_card(replace(FACTS, run=run))
    assert "vllm serve" in card
    assert "0.32 or newer" in card
    assert "0.32" not in model_card(replace(FACTS, run=AdapterRun(use_rslora=True)))


def test_a_base_without_a_name() -> None:
    card = model_card(replace(FACTS, base_model=""))
    assert "base_model" not in front_matter(card)
    assert "vllm serve" not in card
    assert "a base model that wasn't named" in card


@pytest.mark.parametrize(
    ("task", "task_type", "loader"),
    [
        ("image-classification", None, "AutoModelForImageClassification"),
        ("automatic-speech-recognition", None, "AutoModelForSpeechSeq2Seq"),
        ("text-classification", "SEQ_CLS", "AutoModelForSequenceClassification"),
        ("text-to-image", None, None),
    ],
)
def test_a_card_loads_the_base_by_its_tasks_class(task: str, task_type: str | None, loader: str | None) -> None:
    text = how_to_load("a", "org/base", 4, patterns=False, unserved="x", task_type=task_type, task=task)
    assert ("# PEFT" in text) == (loader is not None)
    assert loader is None or f"from transformers import {loader}\n" in text


def test_a_model_that_is_not_transformers_is_made_as_it_was() -> None:
    """`attach` has to be told of its head, and PEFT is given no class of transformers."""
    card = model_card(
        replace(FACTS, base_model="efficientnet-lite0", pipeline_tag="image-classification", head="_fc", num_labels=3)
    )
    assert '\nmodel = efficientnet_lite()\nbank = lb.attach(model, head="_fc")\n' in card
    assert "# PEFT" not in card and "transformers" not in card
    told = how_to_load("a", "timm:resnet18.a1_in1k", 4, patterns=False, unserved="x", task="image-classification", head="fc")
    assert 'import timm\n\nmodel = timm.create_model("resnet18.a1_in1k", pretrained=True)\n' in told
