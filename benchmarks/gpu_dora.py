"""DoRA on one GPU: a training step of ours and of PEFT's, each beside its own plain LoRA.

    python benchmarks/gpu_dora.py --output benchmarks/results/gpu-dora-h200.json
    python benchmarks/gpu_dora.py --tiny                      # the check alone, tiny, on a CPU too

The model, the work and the checks are gpu_families.py's (Qwen3-1.7B's widths, eight blocks, bf16, rank 16 on all linear layers):
loss and every gradient, magnitudes among them, PEFT and ours compiled beside ours on plain torch. What fails isn't timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_families import FAMILIES, NAME, TINY, System, build, captured, check, given_to, ours, pefts
from gpu_model import GIB, WARM_UP, free, spread, timed
from gpu_results import Results

MODEL = "qwen3"


def measure(use_dora: bool, args: argparse.Namespace, results: Results) -> None:
    """Check, then time, DoRA or plain LoRA at all sizes. Raises RuntimeError where a result is wrong."""
    torch._dynamo.reset()
    family, dtype = (TINY, torch.float32) if args.tiny else (FAMILIES[MODEL], torch.bfloat16)
    like = torch.zeros((), device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    model = partial(build, MODEL, family, like.device)
    which = "dora" if use_dora else "lora"
    for work in family.work:
        given = given_to(MODEL, work, like)
        plain = ours(model(dtype), given, compiled=False, use_dora=use_dora)
        assert plain.bank is not None
        systems: dict[str, System] = {"plain": plain, "peft": pefts(model(dtype), plain.bank.adapter(NAME))}
        systems["exact"] = plain if args.tiny else ours(model(torch.bfloat16).float(), given, compiled=False, use_dora=use_dora)
        if like.is_cuda:
            systems["ours"] = ours(model(dtype), given, compiled=True, use_dora=use_dora)
        found = check(systems, given, given_to(MODEL, work, like.float()), dtype)
        results.record["check"][f"{which}-{given.tokens}"] = found
        print(f"check {which}-{given.tokens}: passed, in parts of what is allowed {found}", flush=True)
        del systems["exact"], plain
        free()
        if args.tiny:
            continue
        row: dict[str, Any] = {"item": f"{which}-{MODEL}-{given.tokens}", "tokens": given.tokens, "blocks": family.blocks}
        for name, prefix in (("peft", "peft_"), ("plain", "plain_"), ("ours", "")):
            step = partial(systems[name].step, given)
            timed(step, WARM_UP)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row |= spread(timed(step, args.steps), prefix)
            row[f"{prefix}above_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 2)
        row["captured"] = captured(systems["ours"], 1)
        results.add(row)
        print(row, flush=True)
        systems.clear()
        free()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, keep."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every item")
    made.add_argument("--steps", type=int, default=10, help="timed steps")
    made.add_argument("--commit", help="what is measured, where the folder isn't a git repository")
    made.add_argument("--tiny", action="store_true", help="only the check, of tiny models; on a CPU too")
    args = made.parse_args(arguments)
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("gpu_dora.py needs a GPU; --tiny runs its check without one")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results = Results.start("dora", args.output, gpu=gpu, revision=args.commit, check={})
    for use_dora in (True, False):
        measure(use_dora, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
