"""`lorabank merge` of an adapter of EfficientNet-Lite0 or a timm model: a folder that `predict` and the model's library load."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lorabank.cli.folders import whole_folder
from lorabank.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from lorabank.formats.adapter import Adapter


def merge_into_classifier(args: argparse.Namespace, adapter: Adapter, name: str, folder: Path) -> int:
    """Merge, print what rounding lost, save weights, labels and the image processor."""
    from lorabank.cli.merge import print_report
    from lorabank.tasks.images.load import load_image_model
    from lorabank.tasks.images.merged import WEIGHTS, merge_classifier, read_about

    if args.by_shard:
        raise ConfigError(f"--by-shard: is for folders of transformers' models, and {name} isn't one. Leave the flag out.")
    print(f"loading {name} …", file=sys.stderr, flush=True)
    base = load_image_model(name, dtype=_stored(name) if args.dtype == "auto" else args.dtype, device=args.device)
    with whole_folder(folder) as scratch:
        report, logits = merge_classifier(
            base.model, base.processor, name, adapter, scratch, strength=args.strength, force=args.force
        )
        about = read_about(scratch)
    print_report(report)
    if logits is not None:
        print(f"on a picture: {logits}")
    if about.labels is not None:
        print(f"labels: {', '.join(about.labels[:10])}{' …' if len(about.labels) > 10 else ''}")
    print(f"saved: {folder} (for lorabank predict; {WEIGHTS} in it has the names of {about.architecture}'s own library)")
    return 0


def _stored(name: str) -> str:
    """Our name of the dtype that a merged folder's weights have; fp32 for the others, which come so."""
    import torch

    from lorabank.config.paths import expanded
    from lorabank.models.dtypes import stored_in

    folder = expanded(name, place="model")
    found = stored_in(folder) if folder.is_dir() else None
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(found or torch.float32, "fp32")
