"""Scores of generated text against references, and of a loss: the metrics that `eval.metrics` and `lorabank eval` know."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from lorabank.errors import ConfigError, DataError, LorabankError, MissingExtraError, closest

Scorer = Callable[[list[str], list[list[str]]], float | dict[str, float]]
"""(predictions, references) to a number or several named ones; `references[i]` holds the texts that suit `predictions[i]`."""


def perplexity(loss: float) -> float:
    """exp(loss) for a mean negative log-likelihood in nats a token; inf where that overflows."""
    return math.inf if loss > 700 else math.exp(loss)


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    """Share in [0, 1] of predictions that equal one of their references, white space at the ends aside."""
    hits = sum(
        prediction.strip() in {text.strip() for text in texts} for prediction, texts in zip(predictions, references, strict=True)
    )
    return hits / len(predictions)


def bleu(predictions: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU in [0, 100] by sacrebleu with its standard settings (13a tokens, exponential smoothing)."""
    return _sacrebleu().corpus_bleu(predictions, _streams(references)).score


def chrf(predictions: list[str], references: list[list[str]]) -> float:
    """Corpus chrF2 in [0, 100] by sacrebleu with its standard settings."""
    return _sacrebleu().corpus_chrf(predictions, _streams(references)).score


def rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L as F1 in [0, 1] by rouge-score with stemming: the mean over rows of each one's best reference."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge", "rouge-score") from error
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    rows = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return {kind: sum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "bleu": bleu, "chrf": chrf, "rouge": rouge}
"""Metrics of generated text."""

LOSS_METRICS: dict[str, Callable[[float], float]] = {"loss": float, "perplexity": perplexity}
"""Metrics that follow from the validation loss alone; nothing is generated for them."""


def resolve_scorer(name: str) -> Scorer:
    """The scorer called `name`: an entry of SCORERS, or the user's own as `module:function` or `path/to/file.py:function`.

    A module is looked for where Python looks, then in the working folder. The function has the signature of `Scorer`.
    Raises ConfigError for an unknown name (with the closest one), a module or function that isn't there.
    """
    if name in SCORERS:
        return SCORERS[name]
    if ":" not in name:
        known = [*LOSS_METRICS, *SCORERS]
        raise ConfigError(
            f"metric {name!r}: expected one of {', '.join(known)}, or your own as module:function{closest(name, known)}"
        )
    where, _, attribute = name.rpartition(":")
    module = _module(where, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"metric {name!r}: {where} has no function {attribute!r}{closest(attribute, functions)}")
    return cast(Scorer, function)


def split_metrics(names: Sequence[str]) -> tuple[list[str], dict[str, Scorer]]:
    """(metrics that follow from the loss, scorers by name) for the names of a config. Raises ConfigError for an unknown one."""
    from_loss = [name for name in names if name in LOSS_METRICS]
    return from_loss, {name: resolve_scorer(name) for name in names if name not in LOSS_METRICS}


def check_metrics(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric, MissingExtraError for one of ours whose library isn't there: before training."""
    _, scorers = split_metrics(names)
    for name, scorer in scorers.items():
        if name in SCORERS:
            scorer(["a"], [["a"]])


def check_among(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is none of `known`, those that a task has of its own."""
    for name in names:
        if name not in known:
            raise ConfigError(f"expected some of {', '.join(known)}, got {name!r}{closest(name, known)}")


def score(scorers: Mapping[str, Scorer], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every scorer's result under flat names: `bleu`, `rougeL`, and `name_part` for the parts of a user's own.

    Raises DataError when there is nothing to score, ConfigError when a user's own scorer fails or returns no number.
    """
    texts, targets = list(predictions), [list(row) for row in references]
    if len(texts) != len(targets):
        raise DataError(f"scoring: {len(texts)} predictions against {len(targets)} rows of references; expected as many rows")
    if not texts:
        raise DataError("scoring: no predictions. Is the held-out split empty?")
    bare = next((index for index, row in enumerate(targets) if not row), None)
    if bare is not None:
        raise DataError(f"scoring: row {bare} has no reference to compare with")
    result: dict[str, float] = {}
    for name, scorer in scorers.items():
        result |= _flat(name, _run(name, scorer, texts, targets))
    return result


def _run(name: str, scorer: Scorer, texts: list[str], targets: list[list[str]]) -> float | Mapping[str, float]:
    if name in SCORERS:
        return scorer(texts, targets)
    try:
        return scorer(texts, targets)
    except LorabankError:
        raise
    except Exception as error:  # a user's own function may raise anything
        raise ConfigError(f"metric {name!r} failed: {_what_and_where(error)}") from error


def _what_and_where(error: Exception) -> str:
    """`KeyError: 'x' (mym.py:2)`: the innermost line in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _flat(name: str, value: float | Mapping[str, float]) -> dict[str, float]:
    label = name.rpartition(":")[2]
    parts: Mapping[str, float] = value if isinstance(value, Mapping) else {label: value}
    flat: dict[str, float] = {}
    for key, number in parts.items():
        try:
            flat[key if str(key).startswith(label) else f"{label}_{key}"] = float(number)
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several numbers is a RuntimeError
            raise ConfigError(f"metric {name!r}: expected a number or a dict of numbers, got {number!r} for {key!r}") from error
    return flat


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: stream j holds every row's j-th, None where a row has fewer."""
    width = max(len(texts) for texts in references)
    return [[texts[j] if j < len(texts) else None for texts in references] for j in range(width)]


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing("bleu and chrf", "sacrebleu") from error
    return sacrebleu


def _missing(metric: str, package: str) -> MissingExtraError:
    return MissingExtraError(f"metric {metric}: needs {package!r}, which isn't installed: pip install 'lorabank[eval]'")


def _module(where: str, name: str) -> ModuleType:
    path = Path(where) if where.endswith(".py") else Path(*where.split(".")).with_suffix(".py")
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
                raise ConfigError(f"metric {name!r}: {where} needs {error.name!r}, which isn't installed") from error
        except ValueError as error:
            raise ConfigError(f"metric {name!r}: {where!r} is no module's name. Write module:function") from error
        except Exception as error:  # what a user's module does when it is imported
            raise ConfigError(f"metric {name!r}: {where} can't be imported: {type(error).__name__}: {error}") from error
    if not path.is_file():
        folder = str(Path.cwd())
        raise ConfigError(f"metric {name!r}: no module {where!r}, neither installed nor as {str(path)!r} in {folder!r}")
    spec = importlib.util.spec_from_file_location(f"lorabank_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"metric {name!r}: {str(path)!r} can't be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"metric {name!r}: {str(path)!r} can't be imported: {type(error).__name__}: {error}") from error
    return module
