"""Scores as GLUE gives them, by hand on a few rows and beside scikit-learn's and scipy's own on many."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from lorabank.errors import ConfigError, DataError
from lorabank.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, LabelSet
from lorabank.tasks.text_classification.metrics import (
    DEFAULTS,
    GLUE,
    METRICS,
    Scored,
    check_metrics,
    compute,
    metrics_of,
    positive,
    predicted,
)

TWO = LabelSet(kind=SINGLE, names=("0", "1"))
THREE = LabelSet(kind=SINGLE, names=("contradiction", "entailment", "neutral"))
SCORE = LabelSet(kind=REGRESSION, names=("score",))


def scored(labels: LabelSet, targets: list, predictions: list) -> Scored:
    return Scored(labels=labels, targets=np.array(targets, float), predictions=np.array(predictions, float))


def test_by_hand() -> None:
    found = compute(scored(TWO, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]), ["accuracy", "f1", "matthews"])
    # 2 hits, 1 false alarm, 1 miss, 1 right no: F1 = 4/6; Matthews = (2·1 − 1·1) / √(3·3·2·2)
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3, "matthews": 1 / 6})


def test_which_metrics_glue_has() -> None:
    """Table 1 of the GLUE paper, and what transformers' run_glue prints."""
    assert metrics_of(["glue:mrpc"], SINGLE) == ["accuracy", "f1"]
    assert metrics_of(["glue:STS-B"], REGRESSION) == ["pearson", "spearman"]
    assert metrics_of(["glue:mnli-mm".replace("-mm", "_mismatched")], SINGLE) == ["accuracy"]
    assert metrics_of(["glue:cola"], SINGLE) == ["matthews"]
    assert set(GLUE) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"}
    for task in GLUE:
        check_metrics([f"glue:{task}"], REGRESSION if task == "stsb" else SINGLE)


@pytest.mark.parametrize("task", [task for task in GLUE if task != "stsb"])
def test_glue_classification_beside_scikit_learn(task: str) -> None:
    rng = np.random.default_rng(len(task))
    labels = THREE if task in ("mnli", "ax") else TWO
    targets, guesses = rng.integers(0, labels.outputs, 200), rng.integers(0, labels.outputs, 200)
    guesses[:120] = targets[:120]
    found = compute(scored(labels, list(targets), list(guesses)), metrics_of([f"glue:{task}"], SINGLE))
    expected = {"accuracy": sk.accuracy_score, "f1": sk.f1_score, "matthews": sk.matthews_corrcoef}
    assert found == pytest.approx({name: expected[name](targets, guesses) for name in GLUE[task]}, abs=1e-12)


def test_glue_regression_beside_scipy() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 26, 300) / 5  # STS-B's fifths: ties count
    guesses = targets + rng.normal(0, 1, 300)
    found = compute(scored(SCORE, list(targets), list(guesses)), metrics_of(["glue:stsb"], REGRESSION))
    assert found["pearson"] == pytest.approx(stats.pearsonr(guesses, targets)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(guesses, targets)[0])


def test_f1_is_about_the_positive_label_wherever_it_stands() -> None:
    """The alphabet puts `equivalent` before `not_equivalent`; GLUE's F1 is about the pairs that mean the same."""
    words = LabelSet(kind=SINGLE, names=("equivalent", "not_equivalent"))
    assert positive(words) == 0
    assert positive(TWO) == 1
    assert positive(LabelSet(kind=SINGLE, names=("no", "yes"))) == 1
    by_name = compute(scored(words, [0, 0, 1, 1], [0, 1, 1, 1]), ["f1"])
    by_number = compute(scored(TWO, [1, 1, 0, 0], [1, 0, 0, 0]), ["f1"])
    assert by_name == by_number == pytest.approx({"f1": 2 / 3})


def test_several_labels_a_row() -> None:
    labels = LabelSet(kind=MULTI, names=("a", "b", "c"))
    targets = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    guesses = [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    found = compute(scored(labels, targets, guesses), DEFAULTS[MULTI])
    # micro: 2 hits, 1 miss, 1 false alarm; macro: a 1, b 0 (never said), c 0 (never there)
    assert found == pytest.approx({"f1_micro": 4 / 6, "f1_macro": 1 / 3, "exact_match": 1 / 3})


@pytest.mark.parametrize("name", METRICS)
def test_a_table_of_metrics_takes_the_poorest_of_rows(name: str) -> None:
    """One label everywhere, one number everywhere: never a warning, and no number for a correlation alone."""
    for kind in METRICS[name][1]:
        labels = {SINGLE: TWO, REGRESSION: SCORE, MULTI: LabelSet(kind=MULTI, names=("a", "b"))}[kind]
        rows = [[0.0, 0.0]] * 3 if kind == MULTI else [0.0] * 3
        found = compute(scored(labels, rows, rows), [name])
        assert np.isfinite(found[name]) or name in ("pearson", "spearman")
    assert METRICS[name][0].__doc__


def test_a_prediction_may_be_a_label_that_no_row_has() -> None:
    found = compute(scored(THREE, [0, 0, 1], [0, 2, 1]), ["accuracy", "f1", "f1_macro", "balanced_accuracy", "matthews"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == found["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_decisions() -> None:
    outputs = np.array([[0.2, 1.5], [0.1, -3.0]])
    assert predicted(outputs, TWO).tolist() == [1, 0]
    assert predicted(outputs, LabelSet(kind=MULTI, names=("a", "b"))).tolist() == [[1, 1], [1, 0]]
    assert predicted(outputs[:, :1], SCORE).tolist() == [0.2, 0.1]


def test_padded_outputs_are_never_predicted() -> None:
    """A pass with a wider head fills narrower ones up with −inf."""
    assert predicted(np.array([[-5.0, -7.0, -np.inf]]), THREE).tolist() == [0]


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        check_metrics(["acuracy"])
    with pytest.raises(ConfigError, match=r"no such task of GLUE.*did you mean 'mrpc'"):
        check_metrics(["glue:mrcp"])
    with pytest.raises(ConfigError, match="'pearson': it is for regression, and the labels are single"):
        check_metrics(["pearson"], SINGLE)
    with pytest.raises(DataError, match="no rows"):
        compute(scored(TWO, [], []), ["accuracy"])
    assert metrics_of(["loss"], REGRESSION) == list(DEFAULTS[REGRESSION])
    assert metrics_of(["accuracy", "pearson"], REGRESSION) == ["pearson"]
