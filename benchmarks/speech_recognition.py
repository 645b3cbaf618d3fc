"""Seconds of audio a second in Whisper training: lorabank beside PEFT and the usual loop of transformers' Seq2SeqTrainer.

    python benchmarks/speech_recognition.py                                  # Whisper tiny.en, fp32, a CPU
    python benchmarks/speech_recognition.py --device cuda --shape small      # Whisper small's shape with random weights, bf16

Both train r=16 on every linear layer of encoder and decoder, on the same windows of 30 s and the same labels; each system in a
process of its own, step by step in turn. The other loop has its log-Mel features ready in memory, as after `dataset.map`; ours
makes them in every step, as the first pass over the rows does (`--features-ready`: ours has them, too). Before any time is
printed, losses and gradients of both are compared: a speed-up over a wrong result is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

import lorabank as lb
from lorabank.config.speech import SpeechConfig
from lorabank.config.train import TrainConfig
from lorabank.engine.compiling import compile_blocks, uncompiled_because
from lorabank.engine.engine import Engine
from lorabank.engine.step import forward_backward, optim_step
from lorabank.models.load import locate
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.tasks.speech.rows import SpeechRow
from lorabank.tasks.speech.task import SpeechRecognition
from lorabank.training.allocation import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))
from cpu_training import commit, cpu_name
from turns import Worker, keep, peaks_gib, ratios, serve, steps_of_a_turn

MODEL, RATE_HZ, WINDOW_S = "whisper-tiny.en", 16_000, 30.0
SHAPES = {"tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 32, 20)}
"""Name to hidden size, layers a side, heads (arXiv:2212.04356, table 1)."""
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA, RATE = 16, 32, 1e-4
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker does."""

    system: str
    """`lorabank` or `peft`."""
    rows: int
    adapters: int = 1
    tokens: int = 64
    """Labels a row."""
    device: str = "cpu"
    shape: str | None = None
    """None: tiny.en's own weights."""
    features_ready: bool = False


def load(work: Work) -> tuple[Any, Any]:
    """(model, processor): fp32 on a CPU, bf16 on a GPU."""
    dtype = torch.bfloat16 if work.device.startswith("cuda") else torch.float32
    if work.shape is None:
        folder = locate(MODEL)
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return model.to(work.device).eval(), WhisperProcessor.from_pretrained(folder)
    processor, (width, layers, heads) = plain_processor(), SHAPES[work.shape]
    known = processor.tokenizer.get_vocab()
    end, start = known["<|endoftext|>"], known["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=len(known),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    with torch.device(work.device):
        model = WhisperForConditionalGeneration(config)
    return model.to(dtype).eval(), processor


def plain_processor() -> WhisperProcessor:
    """Whisper's features and a tokenizer of its vocabulary's size, with made-up words: nothing has to be fetched."""
    words = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"word{i}": i for i in range(len(words), 50_256)}
    backend = Tokenizer(BPE(vocab=words, merges=[]))
    marks = ["endoftext", "startoftranscript", *(f"l{i}" for i in range(99)), "translate", "transcribe", "startoflm"]
    backend.add_special_tokens([f"<|{name}|>" for name in (*marks, "startofprev", "nospeech", "notimestamps")])
    backend.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    tokenizer = WhisperTokenizer(tokenizer_object=backend, pad_token="<|endoftext|>")
    return WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def sounds(rows: int) -> list[np.ndarray]:
    """Noise of a whole window a row, the same for both systems."""
    made = np.random.default_rng(0)
    return [made.standard_normal(round(WINDOW_S * RATE_HZ)).astype(np.float32) * 0.1 for _ in range(rows)]


def labels_of(rows: int, tokens: int, start: int, none: int, end: int) -> list[tuple[int, ...]]:
    """Start, no timestamps, random text, end."""
    made = np.random.default_rng(1)
    return [(start, none, *map(int, made.integers(1000, 40000, tokens - 2)), end) for _ in range(rows)]


def peft_step(work: Work) -> Step:
    """The usual loop: collated features and labels, mixed precision on a GPU, AdamW."""
    model, processor = load(work)
    features, labels = peft_inputs(work, model, processor)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR)
    wrapped: Any = peft.get_peft_model(model.train(), config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        with precision(work):
            loss = wrapped(input_features=features.to(work.device, model.dtype), labels=labels.to(work.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if work.device.startswith("cuda"):
            torch.cuda.synchronize()

    return step


def precision(work: Work) -> contextlib.AbstractContextManager[Any]:
    """As `Trainer(bf16=True)` has it."""
    gpu = work.device.startswith("cuda")
    return torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()


def peft_inputs(work: Work, model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(features on the host, labels): the start is the decoder's, so labels begin behind it, and what follows is learned."""
    known = processor.tokenizer.get_vocab()
    marks = [known[f"<|{name}|>"] for name in ("startoftranscript", "notimestamps", "endoftext")]
    features = processor.feature_extractor(sounds(work.rows), sampling_rate=RATE_HZ, return_tensors="pt").input_features
    rows = labels_of(work.rows, work.tokens, *marks)
    return features, torch.tensor([row[1:] for row in rows])


def bank_parts(work: Work) -> tuple[SpeechRecognition, Engine, list[str], list[SpeechRow]]:
    """The task over a bank with its adapters, and the rows."""
    model, processor = load(work)
    task = SpeechRecognition(TrainConfig(task="automatic-speech-recognition"), model, processor, SpeechConfig())
    if work.device.startswith("cuda") and uncompiled_because(model) is None:
        compile_blocks(model)
    bank = lb.attach(model)
    names = [f"adapter{i}" for i in range(work.adapters)]
    for name in names:
        bank.add(name, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets=LINEAR))
    marks = (task.tokens.start, task.tokens.no_timestamps, task.tokens.end)
    rows = [
        row_of(samples, labels, str(i))
        for i, (samples, labels) in enumerate(zip(sounds(work.rows), labels_of(work.rows, work.tokens, *marks), strict=True))
    ]
    return task, task.engine(bank), names, rows


def row_of(samples: np.ndarray, labels: tuple[int, ...], digest: str) -> SpeechRow:
    """A row as reading makes it; features are kept by the digest."""
    return SpeechRow(
        origin="", name="", seconds=WINDOW_S, labels=labels, prefix=1, spoken=None, language="en", text="", transcript="",
        start=0.0, digest=digest, group="", source=None, near=None, rate=RATE_HZ, kept=samples,
    )  # fmt: skip


def bank_step(work: Work) -> Step:
    """What the trainer does in a step."""
    task, engine, names, rows = bank_parts(work)
    optimizer = SlotOptimizer(engine.bank)
    for name in names:
        optimizer.add(name)
    routes = [names[i * len(names) // len(rows)] for i in range(len(rows))]

    def made() -> Any:
        task.hearing.forget()
        return task.batch([[row] for row in rows], routes, examples=range(len(rows)), draws=[0] * len(rows))

    ready = made()

    def step() -> None:
        losses = forward_backward(engine, ready if work.features_ready else made())
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: loss.tokens for name, loss in losses.items()})
        if work.device.startswith("cuda"):
            torch.cuda.synchronize()

    return step


def check_equal(work: Work) -> dict[str, float]:
    """Loss and gradients of one adapter on both systems in fp32, from the same values. Exits when they disagree."""
    work = Work(system="both", rows=2, tokens=16, device="cpu", shape=None if work.shape is None else "tiny")
    task, engine, names, rows = bank_parts(work)
    bank = engine.bank
    with torch.no_grad():
        for _, p in bank.named_parameters(names[0]):
            p.normal_(std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    batch = task.batch([[row] for row in rows], names * 2, examples=range(2), draws=[0, 0])
    loss = forward_backward(engine, batch)[names[0]]
    model, processor = load(work)
    wrapped: Any = peft.get_peft_model(model.eval(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR))
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path, layer in bank.adapter(names[0]).layers.items():
            theirs[f"base_model.model.{path}.lora_A.default.weight"].copy_(layer.A)
            theirs[f"base_model.model.{path}.lora_B.default.weight"].copy_(layer.B)
    features, labels = peft_inputs(work, model, processor)
    reference = wrapped(input_features=features, labels=labels).loss
    reference.backward()
    worst = apart = whole = 0.0
    for name, p in bank.named_parameters(names[0]):
        path, _, role = name.rpartition(".")
        other = theirs[f"base_model.model.{path}.lora_{role}.default.weight"].grad
        assert p.grad is not None and other is not None
        between = float((p.grad / loss.tokens - (other.t() if role == "B" else other)).norm())
        worst, apart, whole = max(worst, between / float(other.norm())), apart + between**2, whole + float(other.norm()) ** 2
    difference = abs(loss.mean - float(reference.detach()))
    total = (apart / whole) ** 0.5
    if difference > 1e-4 or total > 1e-3 or worst > 1e-2:  # a small gradient, such as of keys in random weights, rounds coarsely
        sys.exit(
            f"results disagree (loss by {difference:.2e}, gradients by {total:.2e}, one by {worst:.2e}): no times are printed"
        )
    return {"loss_difference": difference, "gradient_difference": total, "largest_gradient_difference": worst}


def compare(name: str, mine: Work, other: Work, repeats: int, args: argparse.Namespace) -> dict[str, object]:
    """One line of the table: a step of ours beside `repeats` steps of the other, in turn."""
    command = [sys.executable, __file__, "--threads", str(args.threads), "--worker"]
    workers = [Worker([*command, json.dumps(asdict(work))]) for work in (mine, other)]
    found = ratios(*workers, repeats=repeats, rounds=args.rounds, steps=steps_of_a_turn(args.device))
    peaks = peaks_gib(workers, args.device)
    for worker in workers:
        worker.end()
    record = found.record()
    audio = mine.rows * WINDOW_S
    speeds = [round(audio / record["ours_s"], 1), round(audio / record["other_s"], 1)]
    print(
        f"{name:54s} {speeds[0]:9.1f} {speeds[1]:9.1f}   {1 / record['ratio']:.2f} × "
        f"({1 / record['ratio_max']:.2f} to {1 / record['ratio_min']:.2f})   {peaks[0]:.2f} | {peaks[1]:.2f} GiB",
        flush=True,
    )
    return {"work": name, **record, "audio_s_per_s": speeds, "peak_gib": peaks}


def main() -> None:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights in the shape of a larger Whisper (default: tiny.en's own)"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows of the line with one adapter")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="labels a row")
    parser.add_argument("--features-ready", action="store_true", help="ours doesn't make features in its steps either")
    parser.add_argument("--only", default="", help="only the lines whose name holds this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        work = Work(**json.loads(args.worker))
        if work.system == "lorabank":
            keep_freed_memory()
        serve(peft_step(work) if work.system == "peft" else bank_step(work), work.device)
        return
    common: dict[str, Any] = {"device": args.device, "shape": args.shape, "tokens": args.tokens}
    ours = {**common, "system": "lorabank", "features_ready": args.features_ready}
    check = check_equal(Work(system="both", rows=2, **common))
    loss, gradient = check["loss_difference"], check["gradient_difference"]
    print(f"same loss (to {loss:.1e}) and gradients (to {gradient:.1e} of their norm) as PEFT; seconds of audio a second:")
    print(f"{'':54s} {'lorabank':>9s} {'other':>9s}   lorabank / other       peak memory")
    rows: list[dict[str, object]] = []
    record = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None, "shape": args.shape or "tiny.en",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "rounds": args.rounds, "tokens": args.tokens, "features_ready": args.features_ready,
        "check": check, "rows": rows,
    }  # fmt: skip

    def line(name: str, mine: Work, other: Work, repeats: int = 1) -> None:
        if args.only in name:
            rows.append(compare(name, mine, other, repeats, args))
            keep(record, args.output)

    b, n = args.batch, args.adapters
    line(f"one adapter, {b} rows (PEFT)", Work(rows=b, **ours), Work(system="peft", rows=b, **common))
    line(f"{n} adapters, 1 row each ({n} PEFT steps)", Work(rows=n, adapters=n, **ours), Work(system="peft", rows=1, **common), n)
    line(f"{n} adapters, {n} rows (one adapter)", Work(rows=n, adapters=n, **ours), Work(rows=n, **ours))


if __name__ == "__main__":
    main()
