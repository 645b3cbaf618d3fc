"""EfficientNet-Lite0 on sign language digits: LoRA on convolutions and linears, full fine-tuning, and the head alone.

    python studies/sign_digits/run.py --data sign_digits.zip
    python studies/sign_digits/run.py --data sign_digits.zip --arms lora --rates 3e-3 --seeds 1 --epochs 1    # a quick look
    python studies/sign_digits/run.py --data sign_digits.zip --device cuda                                     # minutes for all

All three see the same pictures in the same order, varied by the same draws, for as many epochs, under AdamW and one schedule;
what differs is what is trained, and the learning rate, which each has searched for on validation pictures with the first seed.
Test pictures are looked at once, after the last epoch. Each run is a file in results/ (a GPU's in results/gpu/), and what
is there isn't run again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import tempfile
import time
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorabank as lb
from lorabank.config.images import ImagesConfig
from lorabank.config.train import DataConfig
from lorabank.engine.own_pass import TrainingPass
from lorabank.models.efficientnet_lite import HEAD, efficientnet_lite
from lorabank.tasks.images.augment import augment
from lorabank.tasks.images.metrics import Answer, confusion, scores
from lorabank.tasks.images.model import logits_of
from lorabank.tasks.images.prepare import PreparedImages, prepare_images
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.rows import ImageRow, PixelStore
from lorabank.training.allocation import keep_freed_memory

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SPLIT_SEED = 0
RATES: Mapping[str, Sequence[float]] = {"full": (1e-3, 3e-4, 3e-3), "lora": (3e-3, 1e-3, 1e-2), "head": (3e-3, 1e-2, 1e-3)}
"""Tried with the first seed, the middle one first."""
RANK, ALPHA = 8, 16
TARGETS = ["all-linear", "all-conv"]
BATCH = 32
WARMUP = 0.1
AUGMENT = ("crop", "rotate", "colour")


@dataclass(frozen=True)
class Work:
    """One run."""

    arm: str
    rate: float
    seed: int
    epochs: int
    size: int
    device: str = "cpu"

    @property
    def file(self) -> Path:
        """Where its figures are."""
        folder = RESULTS if self.device == "cpu" else RESULTS / "gpu"
        return folder / f"{self.arm}-{self.rate:g}-seed{self.seed}.json"


class Arm:
    """A model, what of it is trained, and how a step's gradients come about."""

    def __init__(self, work: Work, labels: int) -> None:
        torch.manual_seed(work.seed)
        self.work, self.model = work, efficientnet_lite().to(work.device)
        if work.arm == "lora":
            bank = lb.attach(self.model, head=HEAD)
            config = lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*each adapter trains a head of its own")
                bank.add("signs", config, num_labels=labels, seed=work.seed)
            self.parameters = bank.parameters("signs")
            self._pass = TrainingPass(bank, lambda batch: F.cross_entropy(logits_of(self.model, batch["x"]), batch["y"]))
            return
        fresh = nn.Linear(self.model.get_submodule(HEAD).in_features, labels, device=work.device)
        nn.init.normal_(fresh.weight, std=0.02)
        nn.init.zeros_(fresh.bias)
        setattr(self.model, HEAD, fresh)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(work.arm == "full" or name.startswith(f"{HEAD}."))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def backward(self, x: Tensor, y: Tensor) -> float:
        """Mean loss of a batch; its gradients are in the parameters."""
        if self.work.arm == "lora":
            return float(self._pass({"x": x, "y": y}, "signs"))
        self.model.train(self.work.arm == "full")  # full fine-tuning as usual: batch statistics, drop-connect, dropout
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return float(loss)

    def logits(self, x: Tensor) -> Tensor:
        """Without gradients, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return logits_of(self.model, x)


def factor(step: int, steps: int) -> float:
    """Of the learning rate: a rise, then a straight line to zero."""
    rise = max(1, round(WARMUP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)


def run(work: Work, data: PreparedImages, store: PixelStore) -> dict[str, Any]:
    """Train and score; the figures."""
    arm = Arm(work, len(data.labels))
    optimizer = torch.optim.AdamW(arm.parameters, lr=work.rate, weight_decay=0.0)
    per_epoch = math.ceil(len(data.train) / BATCH)
    steps, curve, losses = work.epochs * per_epoch, [], []
    began, clock = time.process_time(), time.monotonic()
    for epoch in range(work.epochs):
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 * work.seed + epoch)).tolist()
        for place in range(per_epoch):
            chosen = order[place * BATCH : (place + 1) * BATCH]
            draws = [(work.seed * 1_000_003 + epoch) * 1_000_003 + i for i in chosen]
            x, y = batch([data.train[i] for i in chosen], data.labels, store, draws, work.device)
            for group in optimizer.param_groups:
                group["lr"] = work.rate * factor(epoch * per_epoch + place, steps)
            losses.append(arm.backward(x, y))
            torch.nn.utils.clip_grad_norm_(arm.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found = score(arm, data.val, data.labels, store)[0]
        curve.append({"epoch": epoch + 1, "train_loss": sum(losses[-per_epoch:]) / per_epoch, **found})
        print(
            f"{time.strftime('%H:%M:%S')}  {work.file.stem}  {json.dumps({k: round(v, 4) for k, v in curve[-1].items()})}",
            flush=True,
        )
    test, predicted, true = score(arm, data.test, data.labels, store)
    trained = sum(p.numel() for p in arm.parameters)
    return {
        **{key: value for key, value in asdict(work).items() if key != "device"},
        "batch": BATCH,
        "trained_parameters": trained,
        "cpu_seconds": round(time.process_time() - began, 1),
        "seconds": round(time.monotonic() - clock, 1),
        "curve": curve,
        "test": test,
        "confusion": confusion(true, predicted, len(data.labels)).tolist(),
        "labels": list(data.labels),
        "machine": machine(work.device),
    }


def batch(
    rows: Sequence[ImageRow], labels: Sequence[str], store: PixelStore, draws: Sequence[int] | None, device: str
) -> tuple[Tensor, Tensor]:
    """Pictures as the model takes them, and their labels' numbers."""
    pixels = store.stacked(rows).to(device).float() / 255
    if draws is not None:
        pixels = augment(pixels, draws, AUGMENT)
    return store.preprocess.normalise(pixels), torch.tensor([labels.index(row.label or "") for row in rows], device=device)


def score(
    arm: Arm, rows: Sequence[ImageRow], labels: Sequence[str], store: PixelStore
) -> tuple[dict[str, float], list[int], list[int]]:
    """(scores, predicted, true)."""
    answers, true = [], []
    for start in range(0, len(rows), 2 * BATCH):
        x, y = batch(rows[start : start + 2 * BATCH], labels, store, None, arm.work.device)
        shares = arm.logits(x).softmax(-1)
        best = shares.topk(5)
        loss = -shares.gather(1, y[:, None])[:, 0].log()
        for ranked, p, each in zip(best.indices.tolist(), best.values.tolist(), loss.tolist(), strict=True):
            answers.append(Answer(tuple(ranked), tuple(p), each))
        true += y.tolist()
    return scores(answers, true, len(labels)), [answer.ranked[0] for answer in answers], true


def machine(device: str) -> dict[str, str]:
    """Where it ran."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    gpu = {"gpu": torch.cuda.get_device_name()} if device != "cpu" else {}
    return {"torch": torch.__version__, "cpu": platform.machine(), **gpu, "commit": commit.stdout.strip()}


def load(source: Path, size: int, scratch: Path) -> tuple[PreparedImages, PixelStore]:
    """The pictures, split 70 : 15 : 15 by class."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(scratch)
        source = scratch
        while len(below := [entry for entry in source.iterdir() if entry.is_dir()]) == 1:
            source = below[0]
    images = ImagesConfig(image_size=size)
    store = PixelStore(read_off(plain_processor(images), images), 2**32)
    data = prepare_images(DataConfig(train=str(source), val_split=0.15, test_split=0.15), images, store, seed=SPLIT_SEED)
    print("\n".join(data.report.lines()), flush=True)
    return data, store


def works(args: argparse.Namespace, arm: str, rates: Sequence[float]) -> list[Work]:
    """What is to be run with the first seed."""
    return [Work(arm, rate, args.seeds[0], args.epochs, args.size, args.device) for rate in rates]


def best_rate(done: Sequence[Work]) -> float:
    """Of the finished runs the rate with the highest validation accuracy after the last epoch, then the lowest loss."""
    last = {work.rate: json.loads(work.file.read_text())["curve"][-1] for work in done}
    return max(last, key=lambda rate: (last[rate]["accuracy"], -last[rate]["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a digit, or a zip of it")
    parser.add_argument("--arms", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of those that are searched")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        data, store = load(args.data, args.size, Path(scratch))
        searched = {arm: works(args, arm, args.rates or RATES[arm]) for arm in args.arms}
        most = max(map(len, searched.values()))
        for work in [searched[arm][i] for i in range(most) for arm in args.arms if i < len(searched[arm])]:
            finish(work, data, store)
        best = {arm: best_rate(searched[arm]) for arm in args.arms}
        for seed in args.seeds[1:]:
            for arm in args.arms:
                finish(Work(arm, best[arm], seed, args.epochs, args.size, args.device), data, store)


def finish(work: Work, data: PreparedImages, store: PixelStore) -> None:
    """Run it unless it was."""
    if not work.file.is_file():
        found = run(work, data, store)
        work.file.parent.mkdir(parents=True, exist_ok=True)
        work.file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
