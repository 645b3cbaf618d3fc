"""Two adapters over one encoder-decoder, in one pass: one keeps what a sentence is about, the other puts it into German.

    python examples/summarization.py                            # a small T5 with random weights: under a minute, no download
    python examples/summarization.py --model google-t5/t5-small # a real one

With documents of your own:

    lorabank train --task summarization --model google-t5/t5-small --data articles.jsonl --output out/short
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch

import lorabank as lb
from lorabank import api
from lorabank.training.console import ConsoleListener

GERMAN = {
    "the": "die", "cat": "katze", "goat": "ziege", "mouse": "maus", "red": "rote", "old": "alte", "small": "kleine",
    "sleeps": "schläft", "waits": "wartet", "sings": "singt", "in": "in", "behind": "hinter", "before": "vor",
    "house": "hütte", "church": "kirche", "town": "stadt",
}  # fmt: skip


def sentences() -> list[str]:
    """All there are, in a fixed random order."""
    parts = (
        ("red", "old", "small"),
        ("cat", "goat", "mouse"),
        ("sleeps", "waits", "sings"),
        ("in", "behind", "before"),
        ("house", "church", "town"),
    )
    found = [f"the {a} {b} {c} {d} the {e}" for a, b, c, d, e in itertools.product(*parts)]
    random.Random(0).shuffle(found)
    return found


def about(sentence: str) -> str:
    """Who does what."""
    _, _, animal, verb, *_ = sentence.split()
    return f"{animal} {verb}"


def small_t5() -> tuple[Any, Any]:
    """(model, tokenizer) of the words above, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    words = [f"▁{word}" for word in sorted({*GERMAN, *GERMAN.values()})]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -1.0) for w in words)], extra_ids=0)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval(), tokenizer


def main() -> None:
    """Train, score, write for new sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder-decoder's folder or hub id (default: a small T5 with random weights)")
    parser.add_argument("--output", type=Path, default=Path("out/about"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.model:
        base: dict[str, Any] = {"model": args.model}
    else:
        model, tokenizer = small_t5()
        folder = args.output.with_name(args.output.name + "_model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base = {"model": str(folder)}
    known, new = sentences()[:-6], sentences()[-6:]
    rows = {
        "about": [{"source": each, "target": about(each)} for each in known],
        "german": [{"source": each, "target": " ".join(GERMAN[word] for word in each.split())} for each in known],
    }
    console = ConsoleListener()
    try:
        lb.train(
            **base,
            task="text2text-generation",
            output=str(args.output),
            data=rows,
            adapters={"about": {"rank": 8}, "german": {"rank": 16}},
            learning_rate=4e-3,
            batch_size=8,
            max_steps=args.steps,
            eval={
                "every": max(1, args.steps // 4),
                "metrics": ["loss", "chrf", "exact_match"],
                "best": "exact_match",
                "max_new_tokens": 16,
            },
            listeners=[console],
        )
    finally:
        console.close()
    asked, written = args.output.with_name("new.jsonl"), args.output.with_name("written.jsonl")
    asked.write_text("".join(json.dumps({"source": each}) + "\n" for each in new), encoding="utf-8")
    written.unlink(missing_ok=True)
    print(api.predict(args.output, asked, written))
    for line in written.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        print(f"{row['source']:42s} about: {row['about']:16s} german: {row['german']}")


if __name__ == "__main__":
    main()
