"""The README of each task's adapter: every snippet of it is run as it stands, on the run that left it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorabank as lb
from lorabank.cli.main import main
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks import TASKS
from tests.tasks.every import EVERY

SETTINGS: dict[str, dict[str, Any]] = {
    "translation": {"seq2seq": {"source_lang": "en", "target_lang": "de"}},
    "text-to-image": {"diffusion": {"resolution": 32, "bucket_step": 8, "min_side": 16, "sample_steps": 2}},
}
BY_TASK = {
    "text-generation": {"lorabank", "PEFT", "vLLM"},
    "text-classification": {"lorabank", "PEFT"},
    "text-to-image": {"lorabank", "diffusers", "for diffusers (or --to kohya, for other tools)"},
}
"""What the blocks of a card are for; of other tasks lorabank and PEFT."""


def blocks_of(card: str) -> list[tuple[str, str]]:
    """(language, text) of each."""
    return re.findall(r"```(\w+)\n(.*?)```", card, re.DOTALL)


def trained(task: str, where: Path, **more: Any) -> Path:
    """The run's folder."""
    model, data = EVERY[task](where)
    settings = {**SETTINGS.get(task, {}), **more}
    with quiet_transformers():
        lb.train(
            model=str(model), task=task, output=str(where / "run"), data=str(data), max_steps=1, rank=2, batch_size=2, **settings
        )
    return where / "run"


def run_all(card: str, folder: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Run each block but vLLM's; comment of its first line → the names that it leaves."""
    left: dict[str, dict[str, Any]] = {}
    for language, text in blocks_of(card):
        title, _, rest = text.partition("\n")
        what = title.removeprefix("# ").split(":")[0]
        rest = rest.replace(f"path/to/{folder.name}", str(folder))
        names: dict[str, Any] = {}
        if language == "python":
            exec(compile(rest, what, "exec"), names)  # noqa: S102  (our own card is the input; that it runs is the test)
        elif "vllm" not in rest and "lorabank chat" not in rest:
            words = [str(data) if word.split(".")[0].rstrip("/") in DATA else word for word in shlex.split(rest)]
            assert main(words[1:]) == 0, rest
        left[what + (" in Python" if language == "python" and what == "lorabank" else "")] = names
    return left


DATA = ("rows", "pictures", "recordings", "texts")
"""What cards call a user's data."""
WRITING = ("summarization", "translation", "text2text-generation")
"""Tasks that write up to a hundred tokens a row for that."""


@pytest.mark.parametrize("task", [pytest.param(task, marks=[pytest.mark.slow] if task in WRITING else []) for task in TASKS])
def test_every_snippet_runs(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(task, tmp_path)
    monkeypatch.chdir(tmp_path)
    card = (run / "default" / "README.md").read_text()
    config = lb.Adapter.load(run / "default")
    data = {
        "image-classification": tmp_path / "pictures" / "red",
        "object-detection": tmp_path / "coco",
        "automatic-speech-recognition": tmp_path / "sounds",
    }.get(task, tmp_path / "rows.jsonl")
    if task == "text-to-speech":
        data = tmp_path / "lines.txt"
        data.write_text("aei\n")
    left = run_all(card, run / "default", data)
    kinds = {what.removesuffix(" in Python") for what in left}
    assert kinds == BY_TASK.get(task, {"lorabank", "PEFT"})
    if task == "text-to-image":
        assert left["diffusers"]["picture"].size == (16, 16)
        assert left["diffusers"]["pipe"].get_active_adapters()
        return
    bank = left["lorabank in Python"]["bank"]
    assert list(bank.names) == ["default"]
    for name, module in left["PEFT"]["model"].named_modules():
        if name.endswith("lora_B"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_B")
            assert module["default"].weight.equal(config.layers[path].B), path


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_saved_form_is_loaded_without_converting(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS["text-to-image"]["diffusion"], "save_format": form}
    run = trained("text-to-image", tmp_path, diffusion=settings)
    monkeypatch.chdir(tmp_path)
    card = (run / "default" / "README.md").read_text()
    assert "lorabank convert" not in card and "library_name: diffusers" in card
    shutil.rmtree(tmp_path / "drawn", ignore_errors=True)
    left = run_all(card, run / "default", tmp_path)
    assert left["diffusers"]["pipe"].get_active_adapters()
