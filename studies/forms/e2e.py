"""Rows of the study: forms (meaning representations) and descriptions of the E2E NLG Challenge, and what of them is held back."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FIGURES = re.compile(r"priceRange\[[^\]]*£|customer rating\[[^\]]*out of")
"""Forms whose price is in pounds or whose rating is `x out of 5`: the base never sees one."""
SLOT = re.compile(r"([\w ]+)\[(.*?)\]")
SWAPPED = ("name", "near", "food", "eatType")
"""Slots whose values are swapped for others in half of the rows that the base learns from."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A form and one description of it."""

    form: str
    text: str

    @property
    def has_figures(self) -> bool:
        """Whether the form has a price in pounds or a rating of 5."""
        return FIGURES.search(self.form) is not None


def slots(form: str) -> dict[str, str]:
    """Slot to value."""
    return {name.strip(): value.strip() for name, value in SLOT.findall(form)}


def read(file: Path) -> list[Pair]:
    """All rows of one of the challenge's files."""
    with open(file, encoding="utf-8", newline="") as lines:
        return [Pair(form=row["mr"], text=row["ref"].strip()) for row in csv.DictReader(lines)]


def split(pairs: Sequence[Pair], seed: int = 1) -> tuple[list[Pair], list[Pair]]:
    """(training, validation): a tenth of the forms is held out, of those with figures and of the others alike."""
    held: set[str] = set()
    for kind in (True, False):
        forms = sorted({pair.form for pair in pairs if pair.has_figures is kind})
        held.update(random.Random(seed).sample(forms, len(forms) // 10))
    return [pair for pair in pairs if pair.form not in held], [pair for pair in pairs if pair.form in held]


def for_base(pairs: Iterable[Pair]) -> list[Pair]:
    """Rows that the base may see: neither the form nor the text has figures."""
    return [pair for pair in pairs if not pair.has_figures and not re.search(r"[£\d]", pair.text)]


def values(files: Iterable[Path]) -> dict[str, list[str]]:
    """The words that each slot of `SWAPPED` takes in any of the files."""
    found: dict[str, set[str]] = {name: set() for name in SWAPPED}
    for file in files:
        for pair in read(file):
            for name, value in slots(pair.form).items():
                if name in found:
                    found[name].add(value)
    return {name: sorted(own) for name, own in found.items()}


def swapped(pair: Pair, known: Mapping[str, Sequence[str]], draw: random.Random) -> Pair:
    """The pair with other names, neighbours, foods and kinds, in form and text, where the text has them word for word."""
    form, text = pair.form, pair.text
    for name, value in slots(form).items():
        if name in SWAPPED and value in text:
            other = draw.choice(known[name])
            form, text = form.replace(f"{name}[{value}]", f"{name}[{other}]"), text.replace(value, other)
    return Pair(form=form, text=text)


def with_gaps(text: str, draw: random.Random, gap: str) -> str:
    """The text with about a third of its words left out, in runs of one to three."""
    words, kept = text.split(), []
    while words:
        if draw.random() < 0.2:
            del words[: draw.choice((1, 2, 3))]
            kept += [gap] if not kept or kept[-1] != gap else []
        else:
            kept.append(words.pop(0))
    return " ".join(kept)


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """A file of sources and targets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n" for source, target in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def task_files(e2e: Path, work: Path, each: int = 6) -> dict[str, dict[str, Path]]:
    """Task to split to file. `figures`: form to text where there are figures; `form`: text to form; `words`: what the base knows.

    Test rows are the official ones: all descriptions of every form for the first and the last, each `each`-th text for `form`.
    `figures-dev` and `form-dev` are validation rows to be written for: other forms than those of training, of the same words.
    """
    train, val = split(read(e2e / "devset.csv"))
    test = read(e2e / "testset_w_refs.csv")
    files: dict[str, dict[str, Path]] = {"figures": {}, "words": {}, "form": {}}
    for part, pairs in (("train", train), ("val", val), ("test", test)):
        for name, kind in (("figures", True), ("words", False)):
            chosen = [pair for pair in pairs if pair.has_figures is kind]
            files[name][part] = write_rows(work / f"{name}-{part}.jsonl", ((pair.form, pair.text) for pair in chosen))
        back = pairs[::each] if part == "test" else pairs
        files["form"][part] = write_rows(work / f"form-{part}.jsonl", ((pair.text, pair.form) for pair in back))
    for name in ("figures", "form"):
        files[f"{name}-dev"] = {"test": files[name]["val"]}
    return files
