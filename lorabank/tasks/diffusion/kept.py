"""What an adapter's own folder says of the pictures that it was trained on."""

from __future__ import annotations

from lorabank.tasks.kept import Kept

KEPT = Kept(
    section="diffusion",
    names=(
        "resolution",
        "buckets",
        "no_caption",
        "bucket_step",
        "max_aspect",
        "trigger",
        "prediction",
        "sample_steps",
        "sample_guidance",
        "sample_height",
        "sample_width",
        "negative",
    ),
    optional={"prediction": str, "negative": str, "sample_height": int, "sample_width": int},
    way_out=", or say how pictures are drawn (--size, --steps, --guidance)",
)
