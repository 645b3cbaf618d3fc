"""Data sets of pictures: read, split, and with pictures of a class beside them where an object is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.train import DataConfig
from lorabank.data.hold_out import hold_out
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.row_report import Splits, row_report
from lorabank.data.sources import left_aside, main_part, sources_of
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.pictures import Picture, Read, read_pictures
from lorabank.tasks.picture_bytes import SUFFIXES
from lorabank.wording import counted

OBJECT_PICTURES = 20
"""Up to so many pictures are an object's, of which none is held out unless it is asked for."""


def prepare(
    data: DataConfig,
    config: DiffusionConfig,
    *,
    step: int,
    seed: int,
    train: Source | None,
    val: Source | None,
    progress: Progress | None = None,
    caption_note: Callable[[str], str | None] = lambda caption: None,
) -> Splits[Picture]:
    """Read, check and split. Equal pictures never land in two splits. `step`: what sides must be a multiple of.

    `caption_note`: what a user should know of a caption.
    """
    sources = sources_of(data, train, val, expected="a folder of pictures, a metadata file or a data set id", loose=SUFFIXES)
    read = {
        role: read_pictures(
            source, data, config, step=step, role=role, group_by=data.group_by if role == "train" else None, busy=progress
        )
        for role, source in sources.items()
    }
    parts = _split(data, read, seed)
    sizes = Counter(str(picture.fit.bucket) for picture in parts[main_part(read)])
    notes: dict[str, list[str]] = {}
    for each in read.values():
        for note, origins in each.notes.items():
            notes.setdefault(note, []).extend(origins)
    for picture in (picture for part in parts.values() for picture in part):
        if note := caption_note(picture.caption):
            notes.setdefault(note, []).append(picture.origin)
    shown = ", ".join(f"{size} ({count:,})" for size, count in sizes.most_common(6))
    report = row_report(
        read=sum(each.total for each in read.values()),
        errors=[error for each in read.values() for error in each.errors],
        splits=parts,
        facts=[
            *_steps(config, step),
            f"{counted(len(sizes), 'size')}: {shown}{', …' if len(sizes) > 6 else ''}",
            *left_aside(sources, loose=SUFFIXES),
        ],
        notes=notes,
        what="pictures",
    )
    return Splits(train=parts["train"], val=parts["val"], test=parts["test"], report=report)


def caption_note(model: ImageModel, caption: str) -> str | None:
    """That a model's encoders don't read the whole caption."""
    cut = [f"{name} reads ({length} tokens)" for name, (count, length) in model.token_counts(caption).items() if count > length]
    return f"captions longer than {' and '.join(cut)}" if cut else None


def _steps(config: DiffusionConfig, step: int) -> list[str]:
    """That the resolution which was asked for can't be had, where that is so."""
    if config.resolution % step == 0:
        return []
    near = sorted({max(step, config.resolution // step * step), -(-config.resolution // step) * step})
    why = "diffusion.bucket_step" if step == config.bucket_step else "what the model's latents need"
    return [
        f"no picture has a side of diffusion.resolution {config.resolution}: sides are multiples of {step} ({why}). Next to it: "
        f"{' and '.join(map(str, near))}"
    ]


def _split(data: DataConfig, read: dict[str, Read], seed: int) -> dict[str, list[Picture]]:
    parts = {role: each.pictures for role, each in read.items()}
    pictures = parts.get("train", ())
    keys = [picture.digest if picture.group is None else picture.group for picture in pictures]
    few = len({picture.digest for picture in pictures}) <= OBJECT_PICTURES
    return hold_out(parts, keys, data, seed=seed, unit="pictures", few=few).splits


def with_prior(
    splits: Splits[Picture], folder: Path, config: DiffusionConfig, *, step: int, progress: Callable[[int, int], None] | None
) -> Splits[Picture]:
    """The training rows with as many pictures of the class beside them; the object's are repeated where they are fewer."""
    found = read_pictures(
        folder, DataConfig(limit=config.prior_pictures), replace(config, trigger=""), step=step, role="prior", busy=progress
    )
    prior = [replace(picture, prior=True) for picture in found.pictures]
    own = list(splits.train)
    repeats = max(1, round(len(prior) / max(1, len(own))))
    report = splits.report
    fact = f"{counted(len(prior), 'picture')} of the class beside them, each picture {counted(repeats, 'time')} an epoch"
    return replace(splits, train=[*own * repeats, *prior], report=replace(report, facts=(*report.facts, fact)))


def captions_of(pictures: Sequence[Picture]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(picture.caption for picture in pictures))
