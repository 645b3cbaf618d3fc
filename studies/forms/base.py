"""The study's base: a small T5 with a tokenizer of its own, trained from scratch, since no pretrained one was to be had.

    python studies/forms/base.py --e2e FOLDER --output out/forms/base

Two of three rows of a batch describe a form, the third mends a description with gaps. No form and no text that it sees has a
price in pounds or a rating of 5. In half of the rows names, neighbours, foods and kinds of place are swapped for others of the
challenge, those of the test forms too: as words alone, in training rows. A model of the world's text would know them; this one
saw next to no others than those of the 220 forms, and doesn't learn to copy in the time that there was.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from e2e import Pair, for_base, read, split, swapped, values, with_gaps

HERE = Path(__file__).parent
GAP, VOCABULARY = "<gap>", 1000
SPECIAL = ["<pad>", "</s>", "<unk>", GAP]


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes, so that any text has tokens; an end after each."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=[GAP]
    )


def small_t5(vocabulary: int) -> T5ForConditionalGeneration:
    """Two and two layers of width 128."""
    sizes: dict[str, Any] = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.1))


def draw_rows(
    pairs: Sequence[Pair], known: Mapping[str, Sequence[str]], count: int, draw: random.Random
) -> list[tuple[str, str]]:
    """(source, target) of a batch."""
    rows = []
    for i in range(count):
        pair = draw.choice(pairs)
        pair = swapped(pair, known, draw) if draw.random() < 0.5 else pair
        rows.append((pair.form, pair.text) if i % 3 else (with_gaps(pair.text, draw, GAP), pair.text))
    return rows


def batch(tokenizer: Any, rows: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """What the model takes."""
    sources = tokenizer([source for source, _ in rows], padding=True, return_tensors="pt")
    labels = tokenizer([target for _, target in rows], padding=True, return_tensors="pt").input_ids
    return {
        "input_ids": sources.input_ids,
        "attention_mask": sources.attention_mask,
        "labels": labels.masked_fill(labels == 0, -100),
    }


def loss_of(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """Nats a target token."""
    losses, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            part = batch(tokenizer, rows[start : start + 32])
            count = int((part["labels"] != -100).sum())
            losses, tokens = losses + float(model(**part).loss) * count, tokens + count
    return losses / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, required=True, help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    draw = random.Random(1)
    train, val = (for_base(pairs) for pairs in split(read(args.e2e / "devset.csv")))
    known = values(args.e2e / file for file in ("devset.csv", "testset_w_refs.csv"))
    pairs = [each for pair in train for each in (pair, swapped(pair, known, draw))]
    tokenizer = tokenizer_of([text for pair in pairs for text in (pair.form, pair.text)])
    model: Any = small_t5(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.rate, total_steps=args.steps, pct_start=0.05)
    checked = {
        "written": [(pair.form, pair.text) for pair in val],
        "written, names swapped": [(p.form, p.text) for p in (swapped(pair, known, random.Random(2)) for pair in val)],
    }
    curve, began, losses = [], time.process_time(), []
    for step in range(1, args.steps + 1):
        model.train()
        loss = model(**batch(tokenizer, draw_rows(train, known, args.batch, draw))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 500 == 0 or step == args.steps:
            found = {name: loss_of(model, tokenizer, rows) for name, rows in checked.items()}
            curve.append({"step": step, "train": sum(losses) / len(losses), **found})
            losses = []
            print(f"{time.strftime('%H:%M:%S')}  {json.dumps(curve[-1])}", flush=True)
            model.eval()
            source = tokenizer([pair.form for pair in val[::60]], padding=True, return_tensors="pt")
            for pair, ids in zip(val[::60], model.generate(**source, max_new_tokens=60), strict=True):
                print(f"    {pair.form}\n      -> {tokenizer.decode(ids, skip_special_tokens=True)}", flush=True)
            model.save_pretrained(args.output)
            tokenizer.save_pretrained(args.output)
    (HERE / "results").mkdir(exist_ok=True)
    document = {
        "rows": len(train),
        "forms": len({pair.form for pair in train}),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "steps": args.steps,
        "batch": args.batch,
        "rate": args.rate,
        "cpu_seconds": round(time.process_time() - began),
        "torch": torch.__version__,
        "curve": curve,
    }
    (HERE / "results" / "base.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
