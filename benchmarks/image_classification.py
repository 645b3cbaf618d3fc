"""Pictures a second in LoRA training: lorabank beside PEFT in transformers' Trainer, on the same model, batch and machine.

    python benchmarks/image_classification.py --device cuda --output images.json       # ViT-B/16, ResNet-50 and Swin-T by shape
    python benchmarks/image_classification.py --models vit --blocks 2 --size 64 --batch 8 --rounds 3    # a quick look on a CPU

Random weights. Theirs is Trainer's own loop with its data loader; both start from prepared pictures, without augmentation, and
train LoRA of one rank on the same layers and a head in full. Each system works in a process of its own, in turns (turns.py), and
ratios are taken turn by turn. Loss and gradients are compared first: no time is printed over a wrong result.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

import lorabank as lb
from lorabank.config.images import ImagesConfig
from lorabank.engine.compiling import compile_blocks, uncompiled_because
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.models.quiet import quiet_transformers
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.tasks.images.pictures import open_picture
from lorabank.tasks.images.preprocess import plain_processor
from lorabank.tasks.images.rows import ImageRow
from lorabank.tasks.images.task import ImageClassification
from lorabank.training.allocation import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))
from cpu_training import commit, cpu_name
from turns import Turn, Worker, keep, peaks_gib, ratios, serve, steps_of_a_turn

RANK, ALPHA, RATE, LABELS = 16, 32, 1e-4, 100
PICTURES = 512
"""Different ones, that batches are made of."""
TARGETS = {"vit": ["q_proj", "v_proj"], "resnet": ["convolution"], "swin": ["q_proj", "v_proj"]}
"""By model: what PEFT's example for it adapts; of ResNet all convolutions."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker does."""

    system: str
    """`lorabank` or `peft`."""
    model: str
    rows: int
    """Pictures of each adapter in a step."""
    adapters: int
    size: int
    blocks: int | None
    device: str
    bf16: bool


def build(work: Work) -> nn.Module:
    """The model by its shape, random weights, the same for both."""
    torch.manual_seed(0)
    more: dict[str, Any] = {"num_labels": LABELS}
    if work.model == "vit":
        more |= {"image_size": work.size, **({} if work.blocks is None else {"num_hidden_layers": work.blocks})}
        model: Any = hf.ViTForImageClassification(hf.ViTConfig(**more, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    elif work.model == "swin":
        more |= {"image_size": work.size, **({} if work.blocks is None else {"depths": [work.blocks] * 4})}
        model = hf.SwinForImageClassification(hf.SwinConfig(**more, drop_path_rate=0.0))
    else:
        more |= {} if work.blocks is None else {"depths": [work.blocks] * 4}
        model = hf.ResNetForImageClassification(hf.ResNetConfig(**more))
    return model.to(device=work.device, dtype=torch.bfloat16 if work.bf16 else torch.float32).eval()


def pictures(work: Work) -> list[ImageRow]:
    """Noise with labels."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(PICTURES):
        image = Image.fromarray(generator.integers(0, 256, (work.size, work.size, 3), dtype=np.uint8))
        made.append(ImageRow(image, open_picture(image)[1], str(number % LABELS), f"picture {number}"))
    return made


def task_of(work: Work, model: nn.Module) -> ImageClassification:
    """Our task, its labels known."""
    images = ImagesConfig(image_size=work.size, augment=(), labels=[str(i) for i in range(LABELS)])
    config = lb.TrainConfig(task="image-classification", images=images)
    return ImageClassification(config, model, plain_processor(images), {})


def ours(work: Work, rows: Sequence[ImageRow]) -> Callable[[], None]:
    """A step as `lb.train` makes it."""
    model = build(work)
    task = task_of(work, model)
    if uncompiled_because(model) is None:
        compile_blocks(model)
    bank = lb.attach(model)
    names = [f"adapter{i}" for i in range(work.adapters)]
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in names:
        bank.add(name, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[work.model]), num_labels=LABELS)
        optimizer.add(name)
    task.use_labels({name: [str(i) for i in range(LABELS)] for name in names})
    for row in rows:
        task.store.keep(row.digest, task.store.preprocess.pixels(row.picture))  # type: ignore[arg-type]
    count, taken = work.rows * work.adapters, 0

    def step() -> None:
        nonlocal taken
        chosen = [[rows[(taken + i) % len(rows)]] for i in range(count)]
        taken += count
        routes = [name for name in names for _ in range(work.rows)]
        losses = forward_backward(engine, task.batch(chosen, routes, examples=range(count), draws=[0] * count))
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: loss.tokens for name, loss in losses.items()})

    return step


def theirs(work: Work, rows: Sequence[ImageRow], turn: Turn) -> None:
    """Trainer's loop, which asks `turn` after each of its steps."""
    model = build(work)
    store = task_of(work, model).store
    data = [
        {
            "pixel_values": store.preprocess.normalise(store.preprocess.pixels(row.picture)[None].float() / 255)[0],
            "labels": int(row.label or 0),
        }  # type: ignore[arg-type]
        for row in rows
    ]

    class Turns(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not turn.step_done()

    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        arguments = hf.TrainingArguments(
            scratch, per_device_train_batch_size=work.rows, max_steps=1_000_000, learning_rate=RATE, weight_decay=0.0,
            lr_scheduler_type="constant", bf16=work.bf16, use_cpu=work.device == "cpu", report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_drop_last=True,
        )  # fmt: skip
        wrapped: Any = peft.get_peft_model(model, peft_config(work.model))
        hf.Trainer(model=wrapped, args=arguments, train_dataset=data, callbacks=[Turns()]).train()  # type: ignore[arg-type]


def peft_config(model: str) -> peft.LoraConfig:
    """The same adapter for PEFT."""
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[model], modules_to_save=["classifier"])


def check_equal(work: Work) -> dict[str, float]:
    """Loss and gradients of one adapter on both systems in fp32, from the same values. Exits when they disagree."""
    model = build(work)
    task, bank = task_of(work, model), lb.attach(model)
    rows = pictures(work)[:4]
    bank.add("a", lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[work.model]), num_labels=LABELS)
    task.use_labels({"a": [str(i) for i in range(LABELS)]})
    with torch.no_grad():
        for p in bank.parameters("a"):
            p.normal_(std=0.02, generator=torch.Generator(work.device).manual_seed(p.numel()))
    batch = task.batch([[row] for row in rows], ["a"] * 4, examples=range(4), draws=[0] * 4)
    loss = forward_backward(Engine(bank), batch)["a"]
    with tempfile.TemporaryDirectory() as scratch:
        bank.adapter("a").save(scratch)
        wrapped: Any = peft.PeftModel.from_pretrained(build(work), scratch, is_trainable=True).eval()
    reference = wrapped(pixel_values=batch.inputs["pixel_values"], labels=batch.targets["labels"].to(work.device)).loss
    reference.backward()
    other = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    worst = 0.0
    for name, p in bank.named_parameters("a"):
        path, _, role = name.rpartition(".")
        inside = name.removeprefix("classifier.")
        known = f"{path}.lora_{role}.default.weight" if inside == name else f"classifier.modules_to_save.default.{inside}"
        found: Tensor | None = other.get(f"base_model.model.{known}")
        assert p.grad is not None and found is not None, known
        mine = (p.grad / loss.tokens).t() if role == "B" else p.grad / loss.tokens
        distance = float((mine.reshape(found.shape) - found).norm() / found.norm())
        if not distance <= worst:  # also where it is no number
            worst = distance
    difference = abs(loss.mean - float(reference.detach()))
    if not (difference <= 1e-4 and worst <= 2e-3):
        sys.exit(f"{work.model}: results disagree (loss by {difference:.2e}, a gradient by {worst:.2e} of its norm): no times")
    return {"loss_difference": difference, "largest_gradient_difference": worst}


def run_worker(work: Work) -> None:
    """The worker's process."""
    rows = pictures(work)
    if work.system == "peft":
        theirs(work, rows, Turn(work.device))
    else:
        keep_freed_memory()
        serve(ours(work, rows), work.device)


def compare(name: str, mine: Work, other: Work, repeats: int, rounds: int, threads: int) -> dict[str, object]:
    """One line: a step of ours beside `repeats` steps of the other, in turn."""
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(threads), "--worker"]
    workers = [Worker([*command, json.dumps(asdict(work))]) for work in (mine, other)]
    found = ratios(*workers, repeats=repeats, rounds=rounds, steps=steps_of_a_turn(mine.device))
    peaks = peaks_gib(workers, mine.device)
    for worker in workers:
        worker.end()
    record, images = found.record(), mine.rows * mine.adapters
    rates = [round(images / seconds, 1) for seconds in (record["ours_s"], record["other_s"])]
    print(
        f"{name:46s} {rates[0]:9.1f} {rates[1]:9.1f} images/s   {1 / record['ratio']:.2f} × as fast "
        f"({1 / record['ratio_max']:.2f} to {1 / record['ratio_min']:.2f})   {peaks[0]:.2f} | {peaks[1]:.2f} GiB",
        flush=True,
    )
    return {"work": name, **record, "images_per_s": rates, "peak_gib": peaks}


def main() -> None:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on a GPU in bf16")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8, help="of the joint line, with a share of the batch each")
    parser.add_argument("--blocks", type=int, help="fewer than the real model has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "(?s).*each adapter trains a head of its own")
    if args.worker:
        run_worker(Work(**json.loads(args.worker)))
        return
    torch.backends.cudnn.allow_tf32 = False  # of the check; the workers are processes of their own, as torch has it
    rows: list[dict[str, object]] = []
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    record = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_name(), "gpu": gpu, "threads": args.threads,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": hf.__version__, "peft": peft.__version__,
        "size": args.size, "batch": args.batch, "blocks": args.blocks, "rounds": args.rounds, "rows": rows,
    }  # fmt: skip
    for model in args.models:
        side = 224 if model == "swin" else 64  # its windows want more places than 64 pixels give
        small = Work(
            system="", model=model, rows=4, adapters=1, size=side, blocks=args.blocks or 2, device=args.device, bf16=False
        )
        check = check_equal(small)
        found_loss, found_gradient = check["loss_difference"], check["largest_gradient_difference"]
        print(f"{model}: same loss (to {found_loss:.1e}) and gradients (to {found_gradient:.1e} of their norm)")

        real = replace(small, size=args.size, blocks=args.blocks, bf16=args.device.startswith("cuda"))

        each = max(1, args.batch // args.adapters)
        lines = [
            (f"{model}: one adapter, {args.batch} (PEFT, Trainer)", args.batch, 1),
            (f"{model}: {args.adapters} adapters, {each} each ({args.adapters} steps)", each, args.adapters),
        ]
        for name, count, adapters in lines:
            mine = replace(real, system="lorabank", rows=count, adapters=adapters)
            other = replace(real, system="peft", rows=count)
            found = compare(name, mine, other, adapters, args.rounds, args.threads)
            rows.append({**found, "check": check})
            keep(record, args.output)


if __name__ == "__main__":
    main()
