"""`lorabank preview` of every task, by the command line: what it prints, and what it draws."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorabank.cli.main import main
from lorabank.tasks import TASKS
from lorabank.tasks.preview import PASSES, first_draws
from lorabank.tasks.sheet import HEAD, LABEL, sheet
from lorabank.training.streams import RowStream
from tests.tasks.every import EVERY, seen
from tests.tasks.images.made import COLOURS


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task to look at."""

    flags: tuple[str, ...] = ()
    said: tuple[str, ...]
    """What stands in the output."""
    picture: str | None = None
    """File that is drawn."""


PICTURES = ("--diffusion.resolution", "32", "--diffusion.bucket-step", "8", "--diffusion.min-side", "16")
CASES: dict[str, Case] = {
    "text-generation": Case(said=("Legend: ⟦trained", "rows.jsonl:1: ", "⟧")),
    "text-classification": Case(
        flags=("--data.max-length", "16"),
        said=("rows.jsonl:2: two texts, 16 tokens, cut to max_length; label: bad", "poor no 1\nand mo", "8 rows read"),
    ),
    "summarization": Case(
        flags=("--seq2seq.prefix", "summarize: ", "--seq2seq.max-target-length", "1"),
        said=("tokens read, 1 trained (cut to seq2seq.max_target_length)", "source: summarize<unk>the cat sat", "target: ⟦</s>⟧"),
    ),
    "translation": Case(
        flags=("--seq2seq.source-lang", "en", "--seq2seq.target-lang", "de"),
        said=("source: the cat sat", "target: ⟦die katze sass", "</s>⟧"),
    ),
    "text2text-generation": Case(said=("source: the cat", "target: ⟦cat</s>⟧")),
    "automatic-speech-recognition": Case(
        said=(
            "0.wav: 0.50 s, resampled from 8,000 to 16,000 Hz; ",
            " trained",
            "<|startoftranscript|>⟦<|0.00|> word 0<|0.40|><|endoftext|>⟧",
        ),
        picture="sounds-log-mel.png",
    ),
    "text-to-speech": Case(said=("0.wav: 0.18 s, ", " frames, ", "no speaker's embedding", "aei"), picture="voice-log-mel.png"),
    "image-classification": Case(
        flags=("--images.augment", "[crop, colour]"),
        said=("label 'blue', number 0 of 3; 24 × 20 becomes 16 × 16 pixels", "varied in training: crop, colour"),
        picture="pictures-pictures.png",
    ),
    "object-detection": Case(
        said=("32 × 32 becomes 32 × 32 on 32 × 32 pixels", "1 × red", "varied in training: "),
        picture="_annotations.coco.json-boxes.png",
    ),
    "text-to-image": Case(
        flags=PICTURES,
        said=(
            "120 × 80 scaled to 40 × 27, 3 pixels of its height cropped: bucket 40 × 24",
            "caption: a cat a",
            "text_encoder: 7 tokens of at most 12",
        ),
        picture="ink-pictures.png",
    ),
}


def test_every_task_is_looked_at() -> None:
    assert CASES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", CASES)
def test_rows_as_training_sees_them(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[task]
    model, data = EVERY[task](tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.chdir(tmp_path)
    words = ["preview", "--task", task, "--model", str(model), "--data", str(data), "--count", "2", *case.flags]
    if task == "text-to-image":  # no weights are read
        for file in model.rglob("*.safetensors"):
            file.unlink()
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in case.said:
        assert part in text, text
    drawn = sorted(path.name for path in tmp_path.glob("lorabank-preview/*"))
    assert drawn == ([case.picture] if case.picture else [])
    if case.picture:
        file = tmp_path / "lorabank-preview" / case.picture
        assert f"drawn: {file.relative_to(tmp_path)}" in text
        with Image.open(file) as image:
            assert len(np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_pictures_are_as_the_first_passes_vary_them(tmp_path: Path) -> None:
    """Left the plain picture, then the three that training will see; those of another seed differ."""
    model, data = seen(tmp_path)
    made = {}
    for seed in ("1", "1", "2"):
        out = tmp_path / f"look{len(made)}"
        words = ["preview", "--task", "image-classification", "--model", str(model), "--data", str(data), "--seed", seed]
        assert main([*words, "--count", "1", "--pictures", str(out), "--data.val-split", "0"]) == 0
        with Image.open(out / "pictures-pictures.png") as image:
            made[out.name] = np.array(image.convert("RGB"))[HEAD : HEAD + 32]
    first, again, other = made.values()
    assert np.array_equal(first, again)
    wide = (first.shape[1] - LABEL) // 4
    parts = [first[:, LABEL + c * wide : LABEL + c * wide + 32].astype(int) for c in range(4)]
    assert np.abs(parts[0].mean((0, 1)) - COLOURS["blue"]).max() < 20
    assert np.array_equal(parts[0], other[:, LABEL : LABEL + 32])
    assert all(np.abs(parts[0] - part).mean() > 1 for part in parts[1:])
    assert np.abs(other[:, LABEL + wide :].astype(int) - first[:, LABEL + wide :]).mean() > 1


@dataclass(frozen=True)
class _Row:
    size: int
    origin: str = ""
    prompt_text: str = ""
    reference: str = ""
    content: object = None


def test_draws_are_trainings() -> None:
    rows = [_Row(size) for size in (3, 1, 2, 5, 4)]
    stream = RowStream(rows, 2, 7)
    found = first_draws(rows, [4, 1], batch_size=2, seed=7)
    assert [len(own) for own in found] == [PASSES, PASSES]
    where = next(p for p in range(3) if 1 in stream.batch(p))
    assert found[1][0] == stream.draws(where)[stream.batch(where).index(1)]


def test_pictures_of_every_label_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of classes come one after the other."""
    model, data = seen(tmp_path)
    words = ["preview", "--task", "image-classification", "--model", str(model), "--data", str(data), "--data.val-split", "0"]
    assert main([*words, "--count", "4", "--pictures", str(tmp_path / "look")]) == 0
    labels = re.findall(r"label '(\w+)'", capsys.readouterr().out)
    assert len(labels) == 4 and len({*labels[:3]}) == min(3, len([*data.iterdir()]))


def test_sheet_fits_every_picture() -> None:
    """Large ones are made smaller, small ones among them stay as they are, and nothing is cut off."""
    colours = [(250, 0, 0), (0, 250, 0)]
    page = sheet({"a": [Image.new("RGB", (1024, 512), colours[0])], "b": [Image.new("RGB", (20, 90), colours[1])]}, ["one"])
    pixels = torch.from_numpy(np.array(page)).reshape(-1, 3).tolist()
    assert [sum(pixel == list(colour) for pixel in pixels) for colour in colours] == [256 * 128, 20 * 90]
    stream = io.BytesIO()
    page.save(stream, "PNG")
