"""`README.md` of an adapter folder: what it is, what it was trained on, how well it does, how to load it. Real values only."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorabank.config.tasks import DEFAULT_TASK
from lorabank.config.train import AdapterRun
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import write_files
from lorabank.formats.labels import label_names
from lorabank.training import human
from lorabank.training.card_use import LITE, TIMM, how_to_load
from lorabank.training.markdown import cell
from lorabank.training.serving import adapter_obstacle, has_patterns, obstacle
from lorabank.training.task import TASK_KEY
from lorabank.wording import counted

USE = "## Use"
"""Heading of the section on how to load the adapter."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. What isn't known is left out of the card."""

    name: str
    base_model: str
    """Name or folder that other tools can load; '' when the base came as an object without a name."""
    run: AdapterRun
    learning_rate: float
    """As it was resolved."""
    parameters: int
    base_parameters: int
    layers: int
    steps: int
    best_step: int | None
    train_rows: int
    val_rows: int
    data: str
    """Name of the training rows, as it was given."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """On the held-out rows, at the best step."""
    base_metrics: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    """Licence identifier of the adapter; None: not said."""
    warning: str = ""
    """A sentence above everything else: what is wrong with the adapter."""
    tokens_seen: int | None = None
    """Trained tokens."""
    version: str = ""
    """Of lorabank."""
    unserved: str | None = None
    """Why vLLM can't read it, where its file says so."""
    pipeline_tag: str = "text-generation"
    """The task's name on model hubs."""
    task_type: str | None = None
    """PEFT's, which says the base's class."""
    unit: str = "tokens"
    """What `tokens_seen` counts."""
    num_labels: int | None = None
    """Outputs of a classifier's head, which the base has to be loaded with; None for other models."""
    files: Collection[str] = ()
    """Names in the adapter's folder."""
    head: str | None = None
    """Module that gives a number a label, where the model's class doesn't say."""


def model_card(facts: CardFacts) -> str:
    """The text of the card: YAML front matter that model hubs read, then Markdown."""
    front: dict[str, object] = {"base_model": facts.base_model} if facts.base_model else {}
    front |= {"library_name": library_of(facts.pipeline_tag), "pipeline_tag": facts.pipeline_tag}
    front["tags"] = ["lora", "lorabank"]
    if facts.license:
        front["license"] = facts.license
    parts = [
        _front_matter(front),
        f"# {facts.name}",
        *([f"**{facts.warning}**"] if facts.warning else []),
        _what(facts),
        "## Training",
        _training(facts),
    ]
    if facts.metrics:
        parts += ["## Evaluation", _scores(facts)]
    parts += [USE, _use(facts)]
    return "\n\n".join(parts) + "\n"


def library_of(task: str) -> str:
    """What model hubs say that an adapter is used with."""
    return "diffusers" if task == "text-to-image" else "peft"


def _front_matter(front: Mapping[str, object]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---"


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Write the card into an adapter folder; returns its path. Raises OutputError."""
    write_files(Path(folder), {"README.md": model_card(facts)})
    return Path(folder) / "README.md"


def _what(facts: CardFacts) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "a base model that wasn't named"
    made = f" {facts.version}" if facts.version else ""
    return (
        f"A LoRA adapter for {base}, trained with lorabank{made}: "
        f"{human.count(facts.parameters)} parameters in {counted(facts.layers, 'layer')} "
        f"({human.share(facts.parameters, facts.base_parameters)} of the base)."
    )


def _training(facts: CardFacts) -> str:
    run = facts.run
    targets = run.targets if isinstance(run.targets, str) else ", ".join(run.targets)
    batch = counted(run.batch_size, "row") + (
        f" × {run.gradient_accumulation} accumulated" if run.gradient_accumulation > 1 else ""
    )
    rows = [
        ("data", f"{facts.data}: {counted(facts.train_rows, 'row')}, {facts.val_rows:,} held out"),
        ("rank", str(run.rank) + (f", by pattern {dict(run.rank_pattern)}" if run.rank_pattern else "")),
        ("alpha", f"{run.alpha:g}" + (" (rsLoRA: α/√r)" if run.use_rslora else " (α/r)")),
        ("targets", f"`{targets}`"),
        ("dropout", f"{run.dropout:g}"),
        *([("start", run.init)] if run.init != "uniform" else []),
        *([("also trained", also)] if (also := _also_trained(run)) else []),
        ("learning rate", f"{human.rate(facts.learning_rate)}, {run.lr_scheduler}"),
        ("batch", batch),
        ("optimizer", run.optimizer + (f", LoRA+ ratio {run.loraplus_ratio:g}" if run.loraplus_ratio != 1 else "")),
        (
            "steps",
            f"{facts.steps:,}" + (f", the best by validation is {facts.best_step:,}" if facts.best_step is not None else ""),
        ),
    ]
    if facts.tokens_seen is not None:
        rows.append((f"trained {facts.unit}", f"{facts.tokens_seen:,}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows)])


def _also_trained(run: AdapterRun) -> str:
    """What there is beside A and B, in the words of the settings."""
    rows = run.trainable_token_indices
    ids = sum(map(len, rows.values())) if isinstance(rows, Mapping) else len(rows)
    found = [
        *([f"`modules_to_save`: {', '.join(run.modules_to_save)}"] if run.modules_to_save else []),
        *([f"`bias: {run.bias}`"] if run.bias != "none" else []),
        *(["`lora_bias`"] if run.lora_bias else []),
        *([counted(ids, "token row")] if ids else []),
    ]
    return ", ".join(found)


def _scores(facts: CardFacts) -> str:
    lines = [f"On the {counted(facts.val_rows, 'held-out row')}.", ""]
    if facts.base_metrics:
        lines += ["| metric | base | adapter |", "|---|---:|---:|"]
    else:
        lines += ["| metric | adapter |", "|---|---:|"]
    for name, value in facts.metrics.items():
        cell = f" {_score(name, facts.base_metrics.get(name))} |" if facts.base_metrics else ""
        lines.append(f"| {name} |{cell} {_score(name, value)} |")
    return "\n".join(lines)


def _score(name: str, value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else human.score(name, value)


def _use(facts: CardFacts) -> str:
    run = facts.run
    patterns = has_patterns({"rank_pattern": run.rank_pattern, "alpha_pattern": run.alpha_pattern})
    rank = max([run.rank, *run.rank_pattern.values()])
    extras = run.bias != "none" or run.lora_bias or bool(run.trainable_token_indices)
    reason = facts.unserved or obstacle(rank, use_dora=run.use_dora, extras=extras, modules=run.modules_to_save or ())
    if facts.pipeline_tag != "text-generation":
        reason = reason or f"adapters for {facts.pipeline_tag} were never checked there"
    return how_to_load(
        facts.name,
        facts.base_model,
        rank,
        patterns=patterns,
        unserved=reason,
        task_type=facts.task_type,
        num_labels=facts.num_labels,
        task=facts.pipeline_tag,
        files=facts.files,
        head=facts.head,
    )


def card_for_hub(
    text: str | None,
    adapter: Adapter,
    name: str,
    *,
    base_model: str,
    repository: str,
    revision: str | None,
    files: Collection[str] = (),
) -> str:
    """The card of an adapter on a hub: `text` (None: what the adapter itself says) with its base and section on use put right.

    What a run wrote about data and metrics stays as it is.
    """
    ranks = {layer.rank for layer in adapter.layers.values()}
    scalings = {layer.scaling for layer in adapter.layers.values()}
    task = adapter.metadata.get(TASK_KEY, DEFAULT_TASK)
    use = how_to_load(
        name,
        base_model,
        max(ranks),
        patterns=len(ranks) > 1 or len(scalings) > 1,
        unserved=adapter_obstacle(adapter),
        repository=repository,
        revision=revision,
        task_type=adapter.task_type,
        num_labels=len(label_names(adapter) or ()) or None,
        task=task,
        files=files,
        head=next(iter(adapter.modules), None) if base_model == LITE or base_model.startswith(TIMM) else None,
    )
    front, body = _parted(text) if text is not None else ({}, _plain_body(adapter, name, base_model))
    named = _listed(front.get("base_model"))
    old = [one for one in named if len(named) == 1 or one == adapter.base_model]
    for one in old:
        body = body.replace(f"`{one}`", f"`{base_model}`")
    bases = [base_model if one in old else one for one in named]
    bases = list(dict.fromkeys(bases if base_model in bases else [base_model, *bases]))
    front = {"base_model": "", "library_name": library_of(task), **front} | {"base_model": bases[0] if len(bases) == 1 else bases}
    front["tags"] = list(dict.fromkeys([*_listed(front.get("tags")), "lora", "lorabank"]))
    before, after = _around_use(body)
    return "\n\n".join(filter(None, [_front_matter(front), before, USE, use, after])) + "\n"


def _around_use(body: str) -> tuple[str, str]:
    """What stands before and after the section on use, which ends at the next heading of its level outside of code."""
    lines, fence = body.splitlines(), ""
    headings: list[int] = []
    for number, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence and re.match(r"##?\s", line):
            headings.append(number)
    start = next((number for number in headings if lines[number].rstrip() == USE), None)
    if start is None:
        return body.strip(), ""
    end = next((number for number in headings if number > start), len(lines))
    return "\n".join(lines[:start]).strip(), "\n".join(lines[end:]).strip()


def _parted(text: str) -> tuple[dict[str, object], str]:
    """(front matter, the rest) of a card."""
    import yaml

    found = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise AdapterFileError(f"README.md: its front matter is no YAML ({error}). Correct it, or delete the file.") from error
    return (front if isinstance(front, dict) else {}), found[2]


def _listed(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _plain_body(adapter: Adapter, name: str, base_model: str) -> str:
    """What an adapter without a card says of itself."""
    config = adapter.config
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    kind = ("rsLoRA, α/√r" if config.use_rslora else "α/r") + (", DoRA" if config.use_dora else "")
    rows = {
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "alpha": f"{config.alpha:g} ({kind})",
        "targets": f"`{targets}`",
        "dropout": f"{config.dropout:g}",
    }
    count = f"{human.count(adapter.num_parameters)} parameters in {counted(len(adapter.layers), 'layer')}"
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in rows.items())])
    return f"# {name}\n\nA LoRA adapter for `{base_model}`: {count}.\n\n{table}\n"
