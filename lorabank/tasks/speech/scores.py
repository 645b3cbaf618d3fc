"""Word and character error rates, raw and normalised, by jiwer over a whole set of transcripts.

Normalised: Whisper's own rules (arXiv:2212.04356, appendix C) as transformers has them: case, punctuation, fillers, numbers and
contractions for English; case and punctuation for other languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from lorabank.errors import DataError, MissingExtraError
from lorabank.training.scorers import check_among

METRICS = ("wer", "cer", "wer_normalized", "cer_normalized")
"""Errors (substitutions, deletions, insertions) over words or characters of the references; 0 is perfect, above 1 possible."""
LOSS = "loss"
Normaliser = Callable[[str], str]


def normaliser(language: str, spelling: Mapping[str, str] | None = None) -> Normaliser:
    """Whisper's normaliser of a language code. `spelling`: British to American words, as the tokenizer may have them."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer(dict(spelling or {})) if language == "en" else BasicTextNormalizer()


def check_metrics(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric, MissingExtraError where jiwer isn't installed: before anything is loaded."""
    check_among(names, (LOSS, *METRICS))
    _jiwer()


def error_rates(
    references: Sequence[str], predictions: Sequence[str], languages: Sequence[str], spelling: Mapping[str, str] | None = None
) -> dict[str, float]:
    """All METRICS over pairs of transcripts; `languages` has each pair's code. Raises DataError where there is nothing to score.

    Pairs whose reference is empty once normalised ("um.") count what was predicted as insertions.
    """
    if not references:
        raise DataError("speech: no transcripts to score. Is the held-out split empty?")
    rules = {code: normaliser(code, spelling) for code in dict.fromkeys(languages)}
    pairs = list(zip(references, predictions, languages, strict=True))
    normal = [rules[code](said).strip() for said, _, code in pairs], [rules[code](found).strip() for _, found, code in pairs]
    rates = {"": (list(references), list(predictions)), "_normalized": normal}
    jiwer = _jiwer()
    found: dict[str, float] = {}
    for suffix, (said, heard) in rates.items():
        if not any(said):
            raise DataError(
                "speech: every transcript is empty once normalised (marks and fillers alone), so there is no rate of errors"
            )
        found[f"wer{suffix}"] = float(jiwer.wer(said, heard))
        found[f"cer{suffix}"] = float(jiwer.cer(said, heard))
    return {name: found[name] for name in METRICS}


def _jiwer() -> ModuleType:
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError(
            "metrics wer and cer: need 'jiwer', which isn't installed: pip install 'lorabank[speech]'"
        ) from error
    return jiwer
