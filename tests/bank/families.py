"""All families of models that tests run over. docs/architectures.md is made from this table (scripts/architectures.py)."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bank.families_media import AUDIO, SERIES, SEVERAL
from tests.bank.families_text import DECODERS, ENCODER_DECODERS, ENCODERS, EXPERTS, STATE_SPACE
from tests.bank.families_vision import VISION
from tests.bank.family import Family

FAMILIES: Mapping[str, Family] = {
    **DECODERS,
    **EXPERTS,
    **STATE_SPACE,
    **ENCODERS,
    **ENCODER_DECODERS,
    **VISION,
    **AUDIO,
    **SEVERAL,
    **SERIES,
}
