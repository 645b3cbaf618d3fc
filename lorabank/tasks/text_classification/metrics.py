"""Scores of classifiers and regressions, as GLUE gives them: by scikit-learn and scipy. One table: `METRICS`.

`eval.metrics` takes their names, or `glue:TASK` for those that GLUE scores that task by (arXiv:1804.07461, table 1). N rows,
K outputs of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lorabank.errors import ConfigError, DataError, MissingExtraError, closest
from lorabank.tasks.text_classification.labels import KINDS, MULTI, REGRESSION, SINGLE, LabelSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

GLUE: Mapping[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "ax": ("matthews",),
}
"""GLUE's task → what it is scored by; `ax` is its diagnostic set. MNLI's matched and mismatched rows are two files."""
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    SINGLE: ("accuracy", "f1", "matthews"),
    MULTI: ("f1_micro", "f1_macro", "exact_match"),
    REGRESSION: ("pearson", "spearman", "rmse"),
}
"""Kind of labels → what it is scored by where nobody says."""
POSITIVE = ("true", "yes", "positive", "equivalent", "duplicate", "spam")
"""Of two labels the one that F1 is about, whatever its place."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a metric compares."""

    labels: LabelSet
    targets: NDArray[np.float64]
    """(N,): indices of labels, or numbers; (N, K) of zeros and ones for several labels a row."""
    predictions: NDArray[np.float64]
    """The same of the model: the likeliest label, labels above one half, or the number."""


Metric = Callable[[Scored], float]
"""A score of a prediction; NaN where it is undefined, such as the correlation of equal numbers."""


def positive(labels: LabelSet) -> int:
    """Index of the label that F1 of two labels is about: the second, as in GLUE, unless only one is called as in `POSITIVE`."""
    called = [i for i, name in enumerate(labels.names) if name.lower() in POSITIVE]
    return called[0] if len(called) == 1 else 1


def accuracy(scored: Scored) -> float:
    """Share in [0, 1] of rows whose label is right."""
    return float(np.mean(scored.predictions == scored.targets))


def exact_match(scored: Scored) -> float:
    """Share in [0, 1] of rows all of whose labels are right."""
    same = scored.predictions == scored.targets
    return float(np.mean(same.all(axis=1) if same.ndim == 2 else same))


def f1(scored: Scored) -> float:
    """F1 in [0, 1]: of two labels that of the positive one (see `positive`), of more the mean over the labels."""
    if scored.labels.outputs == 2 and scored.labels.kind == SINGLE:
        return _f1(scored, average="binary", pos_label=positive(scored.labels))
    return f1_macro(scored)


def f1_macro(scored: Scored) -> float:
    """The mean over labels of their F1, in [0, 1]."""
    return _f1(scored, average="macro")


def f1_micro(scored: Scored) -> float:
    """F1 of all decisions counted together, in [0, 1]."""
    return _f1(scored, average="micro")


def _f1(scored: Scored, **how: object) -> float:
    targets, guesses = _whole(scored.targets), _whole(scored.predictions)
    there = {} if how["average"] == "binary" else {"labels": _occurring(targets, guesses)}
    return float(_sklearn().f1_score(targets, guesses, zero_division=0.0, **there, **how))


def _occurring(targets: NDArray[np.int64], guesses: NDArray[np.int64]) -> list[int]:
    """Labels that a row has or is given: others have no F1, and a mean over labels is one over these."""
    if targets.ndim == 1:
        return sorted({*targets.tolist(), *guesses.tolist()})
    found = np.flatnonzero((targets | guesses).any(axis=0)).tolist()
    return found or list(range(targets.shape[1]))


def matthews(scored: Scored) -> float:
    """Matthews' correlation in [-1, 1]; 0 where all rows are given, or have, one label."""
    targets, guesses = _whole(scored.targets), _whole(scored.predictions)
    if len({*targets.tolist(), *guesses.tolist()}) == 1:  # scikit-learn gives 0 too, and warns of its table's shape
        return 0.0
    return float(_sklearn().matthews_corrcoef(targets, guesses))


def balanced_accuracy(scored: Scored) -> float:
    """The mean over the labels that occur of the share of their rows that is found, in [0, 1]."""
    targets = _whole(scored.targets)
    recall = _sklearn().recall_score
    return float(recall(targets, _whole(scored.predictions), labels=sorted({*targets.tolist()}), average="macro"))


def pearson(scored: Scored) -> float:
    """Pearson's correlation in [-1, 1]; NaN where the numbers or the predictions are all the same."""
    return math.nan if _constant(scored) else float(_stats().pearsonr(scored.predictions, scored.targets).statistic)


def spearman(scored: Scored) -> float:
    """Spearman's rank correlation in [-1, 1]; NaN as for `pearson`."""
    return math.nan if _constant(scored) else float(_stats().spearmanr(scored.predictions, scored.targets).statistic)


def rmse(scored: Scored) -> float:
    """Root of the mean squared error, in the labels' unit."""
    return float(np.sqrt(np.mean((scored.predictions - scored.targets) ** 2)))


def mae(scored: Scored) -> float:
    """Mean absolute error, in the labels' unit."""
    return float(np.mean(np.abs(scored.predictions - scored.targets)))


METRICS: Mapping[str, tuple[Metric, tuple[str, ...]]] = {
    "accuracy": (accuracy, (SINGLE,)),
    "balanced_accuracy": (balanced_accuracy, (SINGLE,)),
    "f1": (f1, (SINGLE, MULTI)),
    "f1_macro": (f1_macro, (SINGLE, MULTI)),
    "f1_micro": (f1_micro, (SINGLE, MULTI)),
    "matthews": (matthews, (SINGLE,)),
    "exact_match": (exact_match, (SINGLE, MULTI)),
    "pearson": (pearson, (REGRESSION,)),
    "spearman": (spearman, (REGRESSION,)),
    "rmse": (rmse, (REGRESSION,)),
    "mae": (mae, (REGRESSION,)),
}
"""Name → the metric, and the kinds that have it."""
LOWER_IS_BETTER = ("loss", "rmse", "mae")


def check_metrics(names: Sequence[str], kind: str | None = None) -> None:
    """Raise ConfigError for a metric that isn't known, or that rows of `kind` haven't got; MissingExtraError without its library.

    `loss` is always there, and taken here.
    """
    wanted = [metric for name in names for metric in expanded(name)]
    for name in wanted if kind is not None else ():
        if name != "loss" and kind not in METRICS[name][1]:
            have = ", ".join(metric for metric, (_, kinds) in METRICS.items() if kind in kinds)
            raise ConfigError(
                f"metric {name!r}: it is for {' and '.join(METRICS[name][1])}, and the labels are {kind}, which has {have}"
            )
    if any(name != "loss" for name in wanted):
        _sklearn()
        _stats()


def metrics_of(names: Sequence[str], kind: str) -> list[str]:
    """The metrics to compute for rows of `kind`: those asked for that it has; the kind's own where only `loss` is asked for.

    Adapters of several kinds may share a run, so that a metric of one kind is passed over by the others.
    """
    wanted = list(dict.fromkeys(metric for name in names for metric in expanded(name) if metric != "loss"))
    mine = [name for name in wanted if kind in METRICS[name][1]]
    return mine if wanted and mine else list(DEFAULTS[kind])


def expanded(name: str) -> tuple[str, ...]:
    """The metrics that a name means: itself, or those of a task of GLUE. Raises ConfigError for an unknown one."""
    if name == "loss":
        return (name,)
    if name.startswith("glue:"):
        task = name.removeprefix("glue:").lower().replace("-", "").replace("_", "")
        task = {"mnlimatched": "mnli", "mnlimismatched": "mnli"}.get(task, task)
        if task not in GLUE:
            raise ConfigError(f"metric {name!r}: no such task of GLUE{closest(task, GLUE)}. There are {', '.join(GLUE)}.")
        return GLUE[task]
    if name not in METRICS:
        known = ["loss", *METRICS]
        raise ConfigError(f"metric {name!r}: expected one of {', '.join(known)}, or glue:TASK{closest(name, known)}")
    return (name,)


def compute(scored: Scored, names: Sequence[str]) -> dict[str, float]:
    """Each metric by name. Raises DataError without rows."""
    if not len(scored.targets):
        raise DataError("scoring: no rows with labels. Is the held-out split empty?")
    if scored.labels.kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {scored.labels.kind!r}")
    return {name: METRICS[name][0](scored) for name in names}


def predicted(outputs_NK: NDArray[np.float64], labels: LabelSet) -> NDArray[np.float64]:
    """The model's decisions: the likeliest label; labels whose probability is above one half; the number."""
    if labels.kind == SINGLE:
        return outputs_NK.argmax(axis=1).astype(np.float64)
    return (outputs_NK > 0).astype(np.float64) if labels.kind == MULTI else outputs_NK[:, 0]


def _whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return values.astype(np.int64)


def _constant(scored: Scored) -> bool:
    return bool(np.ptp(scored.targets) == 0 or np.ptp(scored.predictions) == 0)


def _sklearn() -> ModuleType:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise _missing("scikit-learn") from error
    return metrics


def _stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise _missing("scipy") from error
    return stats


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(f"scores of classifiers need {package}: pip install 'lorabank[classification]'")
