"""What a merged model is for: written beside its weights, for lorabank, and for transformers where it has words for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.tasks import SECTION_OF, TASK_FILE, TASK_SECTIONS
from lorabank.formats.adapter import Adapter
from lorabank.formats.task_settings import task_settings
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.seq2seq.kept import KEPT as SEQ2SEQ
from lorabank.tasks.seq2seq.model import beginning, set_languages
from lorabank.training.task import TASK_KEY

USED_WITH = ("seq2seq", "speech", "synthesis")
"""Sections whose settings no other file of a model says; those of pictures are in its processor."""


def write_task(folder: Path, adapter: Adapter) -> list[str]:
    """Write it into a merged model's folder; sentences on what was written."""
    task = adapter.metadata.get(TASK_KEY, "")
    section = SECTION_OF.get(task)
    if section is None:
        return []
    settings = task_settings(adapter, section) if section in USED_WITH else {}
    usual = TASK_SECTIONS[section]()
    settings = {name: value for name, value in settings.items() if value != getattr(usual, name, value)}
    (folder / TASK_FILE).write_text(json.dumps({"task": task, "settings": settings}, indent=2) + "\n", encoding="utf-8")
    named = ", ".join(f"{name} {value!r}" for name, value in settings.items())
    if section == "seq2seq":
        _say_to_transformers(folder, SEQ2SEQ.merged(Seq2SeqConfig(), {"": adapter}))
    elif section == "speech" and settings.get("language") is not None:
        _generation(folder, language=settings["language"], task=settings.get("task", "transcribe"))
    return [f"used with, as in training: {named}"] if named else []


def _say_to_transformers(folder: Path, settings: Seq2SeqConfig) -> None:
    """Languages into the tokenizer's file, and how answers begin and are looked for into the model's."""
    if settings == Seq2SeqConfig():
        return
    with quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(str(folder), local_files_only=True))
    languages = settings.source_lang is not None
    set_languages(tokenizer, settings)
    begin = beginning(model, tokenizer)
    if languages:
        tokenizer.save_pretrained(str(folder))
    _generation(
        folder,
        decoder_start_token_id=begin.start,
        forced_bos_token_id=begin.forced,
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )


def _generation(folder: Path, **values: Any) -> None:
    file = folder / "generation_config.json"
    if not file.is_file():
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            GenerationConfig.from_model_config(config).save_pretrained(str(folder))
    said = json.loads(file.read_text(encoding="utf-8"))
    said.pop("_from_model_config", None)  # of such a file transformers drops what only some models have, such as a language
    file.write_text(json.dumps({**said, **values}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
