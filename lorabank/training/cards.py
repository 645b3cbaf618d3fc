"""`README.md` of an adapter folder: what it is, what it was trained on, how well it does, how to load it. Real values only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorabank.config.train import AdapterRun
from lorabank.formats.files import write_files
from lorabank.training import human
from lorabank.training.serving import has_patterns, obstacle, vllm_line


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


def model_card(facts: CardFacts) -> str:
    """The text of the card: YAML front matter that model hubs read, then Markdown."""
    import yaml

    front: dict[str, object] = {"base_model": facts.base_model} if facts.base_model else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    front["tags"] = ["lora", "lorabank"]
    if facts.license:
        front["license"] = facts.license
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{head}---",
        f"# {facts.name}",
        *([f"**{facts.warning}**"] if facts.warning else []),
        _what(facts),
        "## Training",
        _training(facts),
    ]
    if facts.metrics:
        parts += ["## Evaluation", _scores(facts)]
    parts += ["## Use", _use(facts)]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Write the card into an adapter folder; returns its path. Raises OutputError."""
    write_files(Path(folder), {"README.md": model_card(facts).encode()})
    return Path(folder) / "README.md"


def _what(facts: CardFacts) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "a base model that wasn't named"
    made = f" {facts.version}" if facts.version else ""
    return (
        f"A LoRA adapter for {base}, trained with lorabank{made}: "
        f"{human.count(facts.parameters)} parameters in {facts.layers} layers "
        f"({human.share(facts.parameters, facts.base_parameters)} of the base)."
    )


def _training(facts: CardFacts) -> str:
    run = facts.run
    targets = run.targets if isinstance(run.targets, str) else ", ".join(run.targets)
    batch = f"{run.batch_size} rows" + (f" × {run.gradient_accumulation} accumulated" if run.gradient_accumulation > 1 else "")
    rows = [
        ("data", f"{facts.data}: {facts.train_rows:,} rows, {facts.val_rows:,} held out"),
        ("rank", str(run.rank) + (f", by pattern {dict(run.rank_pattern)}" if run.rank_pattern else "")),
        ("alpha", f"{run.alpha:g}" + (" (rsLoRA: α/√r)" if run.use_rslora else " (α/r)")),
        ("targets", f"`{targets}`"),
        ("dropout", f"{run.dropout:g}"),
        ("learning rate", f"{human.rate(facts.learning_rate)}, {run.lr_scheduler}"),
        ("batch", batch),
        ("optimizer", run.optimizer + (f", LoRA+ ratio {run.loraplus_ratio:g}" if run.loraplus_ratio != 1 else "")),
        (
            "steps",
            f"{facts.steps:,}" + (f", the best by validation is {facts.best_step:,}" if facts.best_step is not None else ""),
        ),
    ]
    if facts.tokens_seen is not None:
        rows.append(("trained tokens", f"{facts.tokens_seen:,}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _scores(facts: CardFacts) -> str:
    lines = [f"On the {facts.val_rows:,} held-out rows.", ""]
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
    name, run = facts.name, facts.run
    blocks = [
        f"```python\n# lorabank: beside other adapters in one pass\nimport lorabank as lb\n\nbank = lb.attach(model)\n"
        f'bank.load("{name}", lb.Adapter.load("path/to/{name}"))\nbank.use("{name}")\n```',
    ]
    if not facts.base_model:
        return blocks[0]
    blocks.append(
        f"```python\n# PEFT\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.base_model}")\n'
        f'model = PeftModel.from_pretrained(model, "path/to/{name}")\n```'
    )
    rank = max([run.rank, *run.rank_pattern.values()])
    reason = obstacle(rank, use_dora=run.use_dora)
    if reason is None:
        patterns = {"rank_pattern": run.rank_pattern, "alpha_pattern": run.alpha_pattern}
        version = " (0.32 or newer: rank and alpha differ between layers)" if has_patterns(patterns) else ""
        blocks.append(f"```sh\n# vLLM{version}\n{vllm_line(facts.base_model, {name: f'path/to/{name}'}, rank)}\n```")
    else:
        blocks.append(f"vLLM can't read this adapter rightly as it is: {reason}.")
    return "\n\n".join(blocks)
