"""`lorabank merge` of an adapter that draws: a pipeline of diffusers with it in the weights."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from lorabank.cli.folders import whole_folder
from lorabank.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from lorabank.formats.adapter import Adapter


def merge_into_pipeline(args: argparse.Namespace, adapter: Adapter, name: str, folder: Path) -> int:
    """Merge the parts of an image pipeline that the adapter changes, and copy the rest."""
    from lorabank.cli.merge import print_report
    from lorabank.models.load import pick_device, pick_dtype
    from lorabank.tasks.diffusion.merge import merge_pipeline

    if args.by_shard:
        raise ConfigError(
            "--by-shard: is for one model's files, and the base is a pipeline of several, of which a merge holds no more than "
            "the parts that adapters change. Leave the flag out."
        )
    dtype = None if args.dtype == "auto" else pick_dtype(args.dtype, pick_device("cpu"))
    with whole_folder(folder) as scratch:
        report = merge_pipeline(
            name, adapter, scratch, dtype=dtype, device=args.device, strength=args.strength, force=args.force,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        kind = json.loads((scratch / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    print_report(report)
    print("pictures weren't compared: draw the same captions from both folders with the same seeds")
    half = "" if report.dtypes == ("float32",) else f", dtype=torch.{report.dtypes[0]}"  # one for parts that differ
    print(f"saved: {folder} (a plain pipeline: {kind}.from_pretrained({str(folder)!r}{half}))")
    return 0
