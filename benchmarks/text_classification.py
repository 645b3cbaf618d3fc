"""Training a text classifier: lorabank beside PEFT in a Trainer's loop, on the same model, rows and machine, in turns.

    python benchmarks/text_classification.py                       # BERT-base's shape, 16 × 128, fp32, CPU
    python benchmarks/text_classification.py --layers 4 --rounds 3 # a quick look
    python benchmarks/text_classification.py --device cuda         # bf16

Weights are random: a step takes as long as with trained ones. Each system works in a process of its own (turns.py). A step of
ours is what `lorabank train` makes of its rows: the task's batch, one pass, the optimizer; PEFT's is forward, backward, clipping,
AdamW, the schedule. Both train r=16 on all linear layers and the head in full. Before any time is printed, losses and gradients
of both are compared: a speed-up over a wrong result is refused.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

import lorabank as lb
from lorabank.config.train import DataConfig, TrainConfig
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.tasks import task_kind
from lorabank.tasks.text_classification.labels import SINGLE, LabelSet
from lorabank.tasks.text_classification.rows import ClassRow, LabelledText
from lorabank.training.allocation import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))
from cpu_training import commit, cpu_name
from turns import Worker, keep, peaks_gib, ratios, serve, steps_of_a_turn

RANK, ALPHA, RATE, VOCABULARY = 16, 32, 1e-4, 30522
TARGETS = ["query", "key", "value", "dense"]
"""All linear layers but the head, the pooler's among them."""
LABELS = (2, 3, 5)
"""Labels of the adapters: each has its own set."""
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker does."""

    system: str
    """`lorabank` or `peft`."""
    rows: int
    tokens: int
    adapters: int = 1
    layers: int = 12
    device: str = "cpu"


def base(work: Work, labels: int) -> BertForSequenceClassification:
    """BERT-base's shape, random by one seed; bf16 on a GPU."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=work.layers, num_labels=labels)
    dtype = torch.bfloat16 if work.device.startswith("cuda") else torch.float32
    return BertForSequenceClassification(config).to(torch.device(work.device), dtype).eval()


def rows_of(work: Work, labels: int, seed: int) -> list[ClassRow]:
    """Rows of full length, as a tokenizer gives them."""
    ids = torch.randint(1000, VOCABULARY, (work.rows, work.tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        ClassRow(
            input_ids=tuple(own),
            token_type_ids=(0,) * work.tokens,
            source=LabelledText(text="", pair=None, label=str(i % labels), origin=str(i)),
            truncated=False,
        )
        for i, own in enumerate(ids)
    ]


def bank_step(work: Work) -> tuple[Step, Any]:
    """lorabank with adapters of their own label sets, each with its own rows; and its bank."""
    model = base(work, LABELS[0])
    if work.device.startswith("cuda"):
        compile_blocks(model)
    words = Tokenizer(WordLevel(vocab={"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    config = TrainConfig(task="text-classification", data=DataConfig(val_split=0))
    task: Any = task_kind("text-classification").open(config, model, tokenizer, {})
    bank = lb.attach(model)
    optimizer, engine = SlotOptimizer(bank), task.engine(bank)
    rows, routes = [], []
    for i in range(work.adapters):
        name, labels = f"adapter{i}", LABELS[i % len(LABELS)]
        bank.add(name, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS), num_labels=labels)
        optimizer.add(name)
        task.sets[name] = LabelSet(kind=SINGLE, names=tuple(map(str, range(labels))))
        rows += [[row] for row in rows_of(work, labels, seed=i)]
        routes += [name] * work.rows
    names = list(dict.fromkeys(routes))
    steps = 0

    def step() -> None:
        nonlocal steps
        batch = task.batch(rows, routes, examples=range(len(rows)), draws=[0] * len(rows))
        losses = forward_backward(engine, batch, steps=dict.fromkeys(names, steps))
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: loss.tokens for name, loss in losses.items()})
        steps += 1
        _wait(work)

    return step, bank


def peft_model(work: Work, *, training: bool) -> Any:
    """PEFT's model of one adapter."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="SEQ_CLS")
    return peft.get_peft_model(base(work, LABELS[0]).train(training), config).train(training)


def peft_batch(work: Work) -> dict[str, torch.Tensor]:
    """The rows of the first adapter as a data collator gives them."""
    rows = rows_of(work, LABELS[0], seed=0)
    ids = torch.tensor([row.input_ids for row in rows])
    labels = torch.tensor([int(str(row.label)) for row in rows])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), "labels": labels}
    return {name: tensor.to(work.device) for name, tensor in found.items()}


def peft_step(work: Work) -> Step:
    """A step of transformers' Trainer over PEFT's model, its base's dropout on as usual."""
    model = peft_model(work, training=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 10_000)

    def step() -> None:
        model(**peft_batch(work)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _wait(work)

    return step


def _wait(work: Work) -> None:
    if work.device.startswith("cuda"):
        torch.cuda.synchronize()


def check_equal(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of one adapter on both systems in fp32, from the same values. Exits when they disagree."""
    work = Work(system="peft", rows=4, tokens=32, layers=min(2, args.layers))
    step, bank = bank_step(work)
    del step
    with torch.no_grad():
        for p in bank.parameters("adapter0"):
            p.normal_(std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    adapter = bank.adapter("adapter0")
    wrapped = peft_model(work, training=False)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        wrapped.load_adapter(folder, "ours", is_trainable=True)
    wrapped.set_adapter("ours")
    reference = wrapped(**peft_batch(work)).loss
    reference.backward()
    theirs = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    task, rows = _task_of(bank), rows_of(work, LABELS[0], seed=0)
    batch = task.batch([[row] for row in rows], ["adapter0"] * len(rows), examples=range(len(rows)), draws=[0] * len(rows))
    loss = forward_backward(task.engine(bank), batch)["adapter0"]
    worst, compared = 0.0, 0
    for name, p in bank.named_parameters("adapter0"):
        path, _, role = name.rpartition(".")
        suffix = f"lora_{role}.ours.weight" if role in ("A", "B") else f"modules_to_save.ours.{role}"
        other, mine = theirs[f"base_model.model.{path}.{suffix}"], p.grad
        assert mine is not None
        mine = mine / loss.tokens
        worst = max(worst, float((mine - (other.t() if role == "B" else other)).norm() / other.norm()))
        compared += 1
    difference = abs(loss.mean - float(reference.detach()))
    if difference > 1e-4 or worst > 1e-3 or compared != len(theirs):
        sys.exit(f"results disagree (loss by {difference:.2e}, a gradient by {worst:.2e} of its norm): no times are printed")
    return {"loss_difference": difference, "largest_gradient_difference": worst}


def _task_of(bank: Any) -> Any:
    """A task over the bank's model that knows the first adapter's labels."""
    words = Tokenizer(WordLevel(vocab={"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    task: Any = task_kind("text-classification").open(TrainConfig(task="text-classification"), bank.model, tokenizer, {})
    task.sets["adapter0"] = LabelSet(kind=SINGLE, names=tuple(map(str, range(LABELS[0]))))
    return task


def run_worker(work: Work) -> None:
    """The worker's process."""
    if work.system == "lorabank":
        keep_freed_memory()
    serve(peft_step(work) if work.system == "peft" else bank_step(work)[0], work.device)


def compare(name: str, mine: Work, other: Work, repeats: int, args: argparse.Namespace) -> dict[str, object]:
    """One line of the table: a step of ours beside `repeats` of the other, in turn."""
    line = [sys.executable, __file__, "--threads", str(args.threads), "--worker"]
    workers = [Worker([*line, json.dumps(asdict(work))]) for work in (mine, other)]
    found = ratios(*workers, repeats=repeats, rounds=args.rounds, steps=steps_of_a_turn(args.device))
    peaks = peaks_gib(workers, args.device)
    for worker in workers:
        worker.end()
    result = {"work": name, **found.record(), "peak_gib": peaks}
    rates = [mine.rows * mine.adapters / found.record()[key] for key in ("ours_s", "other_s")]
    result["rows_per_second"] = [round(rate, 2) for rate in rates]
    spread = f"({min(found.each):.2f} to {max(found.each):.2f})"
    print(
        f"{name:52s} {rates[0]:8.1f} {rates[1]:8.1f} rows/s   {result['ratio']:.2f} × the time {spread}   "
        f"{peaks[0]:.2f} | {peaks[1]:.2f} GiB",
        flush=True,
    )
    return result


def main() -> None:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        run_worker(Work(**json.loads(args.worker)))
        return
    check = check_equal(args)
    loss, gradient = check["loss_difference"], check["largest_gradient_difference"]
    print(f"same loss (to {loss:.1e}) and gradients (to {gradient:.1e} of their norm) as PEFT")
    print(f"{'':52s} {'lorabank':>8s} {'PEFT':>8s}          lorabank / PEFT              peak memory")
    shape: dict[str, Any] = {"rows": args.rows, "tokens": args.tokens, "layers": args.layers, "device": args.device}
    one, three = (Work(system="lorabank", adapters=count, **shape) for count in (1, 3))
    other, size = Work(system="peft", **shape), f"{args.rows} × {args.tokens}"
    rows: list[dict[str, object]] = []
    record = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_name(), "threads": args.threads, **shape,
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "rounds": args.rounds, "check": check, "lines": rows,
    }  # fmt: skip
    lines = [
        (f"one adapter, {size}", one, 1),
        (f"three label sets, {size} each, one pass (three steps)", three, 3),
    ]
    for name, mine, repeats in lines:
        rows.append(compare(name, mine, other, repeats, args))
        keep(record, args.output)


if __name__ == "__main__":
    main()
