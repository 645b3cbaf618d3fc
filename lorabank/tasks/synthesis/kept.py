"""What an adapter's own folder says of how its spectra become sound."""

from __future__ import annotations

from dataclasses import replace

from lorabank.config.paths import expanded
from lorabank.config.synthesis import SynthesisConfig
from lorabank.tasks.kept import Kept

KEPT = Kept(section="synthesis", names=("vocoder", "stop"), optional={"vocoder": str}, way_out="")


def kept(settings: SynthesisConfig) -> dict[str, str]:
    """For an adapter that was trained with these; a vocoder's folder is named in full, as the base's is."""
    vocoder = settings.vocoder
    if vocoder is not None and (path := expanded(vocoder, place="synthesis.vocoder")).is_dir():
        vocoder = str(path.resolve())
    return KEPT.as_metadata(replace(settings, vocoder=vocoder))
