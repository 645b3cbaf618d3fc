"""Greedy tokens from real llama.cpp for a base model and its adapters. Runs in llama-cpp-python's environment, not in lorabank's.

    python generate_llama_cpp.py --prompts prompts.json --output answers.json base=base.gguf formal=base.gguf+formal.gguf

A row is NAME=MODEL, or NAME=MODEL+ADAPTER. `prompts.json` and the output have the form of `studies/vllm/generate_vllm.py`, so
that `studies/vllm/compare.py check` compares them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def answer(llama: Any, ids: list[int], spec: dict[str, Any]) -> dict[str, Any]:
    """One prompt's greedy tokens, and the log-probabilities of the two likeliest at each."""
    import numpy as np

    llama.reset()
    llama.eval(ids)
    tokens: list[int] = []
    top2: list[list[float]] = []
    while len(tokens) < spec["max_new_tokens"]:
        logits = np.asarray(llama.scores[llama.n_tokens - 1], dtype=np.float64)
        shifted = logits - logits.max()
        log_probabilities = shifted - np.log(np.exp(shifted).sum())
        token = int(logits.argmax())
        tokens.append(token)
        top2.append(np.sort(log_probabilities)[::-1][:2].tolist())
        if token in spec["stop_token_ids"]:
            break
        llama.eval([token])
    return {"tokens": tokens, "top2": top2}


def main() -> None:
    """Read the prompts, generate, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON with prompts as token ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("rows", nargs="+", metavar="NAME=MODEL[+ADAPTER]")
    args = parser.parse_args()

    from llama_cpp import Llama

    spec = json.loads(args.prompts.read_text(encoding="utf-8"))
    needed = max(map(len, spec["prompts"])) + spec["max_new_tokens"]
    started = time.perf_counter()
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in args.rows:
        name, _, files = row.partition("=")
        model, _, adapter = files.partition("+")
        llama = Llama(
            model_path=model,
            lora_path=adapter or None,
            n_ctx=needed,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            logits_all=True,
            verbose=False,
            type_k=0,  # float32 keys and values, as the other side keeps them
            type_v=0,
        )
        answers[name] = [answer(llama, ids, spec) for ids in spec["prompts"]]
        llama.close()
    document = {
        "versions": {"llama-cpp-python": version("llama-cpp-python"), "python": platform.python_version()},
        "settings": {"threads": args.threads, "kv": "float32", "rows": [row.partition("=")[0] for row in args.rows]},
        "seconds": round(time.perf_counter() - started, 1),
        "answers": answers,
    }
    args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"wrote {args.output}: {', '.join(answers)} on {len(spec['prompts'])} prompts in {document['seconds']} s")


if __name__ == "__main__":
    main()
