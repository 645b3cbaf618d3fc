"""A recorded run of two adapters, as its events."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from lorabank.training.events import AdapterPlan, AdapterResult, EvalRecord, Listener, Notice, RunPlan, RunResult, StepRecord
from lorabank.training.serving import chat_line

REASON = "10 × the full fine-tuning rate for Llama models of width 576"
NAMES = {"formal": (4, 20), "terse": (16, 12)}


def plan(resumed_from: str | None = None) -> RunPlan:
    return RunPlan(
        model="org/Tiny-135M",
        output="out/e2e",
        device="cpu",
        base_dtype="fp32",
        base_parameters=134_515_008,
        resumed_from=resumed_from,
        adapters=[
            AdapterPlan(
                name=name,
                rank=rank,
                parameters=rank * 305_000,
                layers=210,
                total_steps=steps,
                learning_rate=5.37e-4,
                learning_rate_reason=REASON,
                train_rows=1600,
                val_rows=100,
            )
            for name, (rank, steps) in NAMES.items()
        ],
    )


def step(name: str, index: int) -> StepRecord:
    total = NAMES[name][1]
    return StepRecord(
        adapter=name,
        step=index,
        total_steps=total,
        pass_index=index,
        epoch=index / 10,
        loss=1 + 2 * math.exp(-index / 5),
        learning_rate=5.37e-4 * (1 - index / total),
        grad_norm=0.4,
        tokens=300,
        tokens_seen=300 * index,
        tokens_per_second=1234.5,
        seconds_left=(total - index) * 20.0,
    )


def evaluation(name: str, index: int, loss: float, *, best: bool, turned: bool = False) -> EvalRecord:
    return EvalRecord(adapter=name, step=index, pass_index=index, metrics={"loss": loss, "bleu": 30.11}, best=best, turned=turned)


def play(listeners: Sequence[Listener], first: int = 1, last: int = 20, resumed_from: str | None = None) -> None:
    """The passes `first` to `last` of the run, without its end."""
    for listener in listeners:
        listener.on_start(plan(resumed_from))
        if first == 1:
            listener.on_eval(EvalRecord(adapter="base", step=0, pass_index=0, metrics={"loss": 3.21, "bleu": 4.2}, best=False))
        for index in range(first, last + 1):
            for name, (_, total) in NAMES.items():
                if index <= total:
                    listener.on_step(step(name, index))
            if index == 10:
                listener.on_eval(evaluation("formal", 10, 1.25, best=True))
                listener.on_eval(evaluation("terse", 10, 1.05, best=True))
            if index == 15:
                listener.on_eval(evaluation("formal", 15, 1.31, best=False, turned=True))
                listener.on_notice(Notice(text="validation loss is rising", adapter="formal", level="warning"))
            if index == 12:
                listener.on_notice(Notice(text="checkpoint written"))


def result(folder: Path, **more: object) -> RunResult:
    """The end of the run; writes what `vllm serve` needs to know into the adapters' folders."""
    adapters = {}
    for name, (rank, steps) in NAMES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        config = {"r": rank, "lora_alpha": 32, **(more if name == "terse" else {})}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        adapters[name] = AdapterResult(
            name=name,
            folder=str(folder / name),
            steps=steps,
            status="finished",
            best_step=10,
            best_metrics={"loss": 1.25 if name == "formal" else 1.05, "bleu": 30.11},
            final_metrics={"loss": 1.4, "bleu": 28.0},
        )
    talk = ("talk to them side by side:", [chat_line(str(folder), [*adapters, "base"])])
    base = {"loss": 3.21, "bleu": 4.2}
    return RunResult(output=str(folder), seconds=345, adapters=adapters, base_metrics=base, next_lines=[talk])
