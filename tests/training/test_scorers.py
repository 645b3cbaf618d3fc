"""Scores against published values, several and ragged references, the user's own function, and mistakes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lorabank.errors import ConfigError, DataError, MissingExtraError
from lorabank.training.scorers import LOSS_METRICS, SCORERS, perplexity, resolve_scorer, score, split_metrics

# The example of sacrebleu's own documentation, with the scores printed there.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_are_the_published_values() -> None:
    assert SCORERS["bleu"](PREDICTIONS, REFERENCES) == pytest.approx(48.530827, abs=1e-5)
    assert SCORERS["chrf"](PREDICTIONS, REFERENCES) == pytest.approx(59.73, abs=0.005)


@pytest.mark.parametrize("name", SCORERS)
def test_a_perfect_answer_scores_highest_and_a_wrong_one_lower(name: str) -> None:
    best = {"exact_match": 1.0, "bleu": 100.0, "chrf": 100.0, "rouge": 1.0}[name]
    right = score(
        {name: SCORERS[name]},
        ["the eagle is a cheap pub by the river"],
        [["something else", "the eagle is a cheap pub by the river"]],
    )
    wrong = score({name: SCORERS[name]}, ["quite another matter altogether"], [["the eagle is a cheap pub by the river"]])
    assert set(right) == set(wrong)
    for key, value in right.items():
        assert value == pytest.approx(best), key
        assert wrong[key] < 0.5 * best, key


@pytest.mark.parametrize("name", SCORERS)
def test_rows_may_have_different_numbers_of_references(name: str) -> None:
    """A row's missing references neither help nor hurt: repeating its last one changes nothing."""
    ragged = [REFERENCES[0], REFERENCES[1][:1], [*REFERENCES[2], "The man was bitten."]]
    filled = [(row + [row[-1]] * 3)[:3] for row in ragged]
    assert score({name: SCORERS[name]}, PREDICTIONS, ragged) == pytest.approx(score({name: SCORERS[name]}, PREDICTIONS, filled))


def test_more_references_never_lower_the_score() -> None:
    for name in ("bleu", "chrf", "rouge"):
        one = score({name: SCORERS[name]}, PREDICTIONS, [row[:1] for row in REFERENCES])
        two = score({name: SCORERS[name]}, PREDICTIONS, REFERENCES)
        assert all(two[key] >= one[key] for key in one)


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert LOSS_METRICS["perplexity"](2.0) == pytest.approx(7.389056)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_metrics_are_split_into_those_of_the_loss_and_those_of_text() -> None:
    from_loss, scorers = split_metrics(["loss", "bleu", "perplexity"])
    assert from_loss == ["loss", "perplexity"]
    assert scorers == {"bleu": SCORERS["bleu"]}


def test_own_function_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def length(predictions, references):\n"
        "    return {'mean': sum(map(len, predictions)) / len(predictions), 'rows': len(references)}\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my_metrics:length", f"{tmp_path}/my_metrics.py:length"):
        assert score({name: resolve_scorer(name)}, ["ab", "abcd"], [["x"], ["y"]]) == {"length_mean": 3.0, "length_rows": 2.0}
    with pytest.raises(ConfigError, match=r"has no function 'lenght' .*'length'"):
        resolve_scorer("my_metrics:lenght")


def test_own_function_from_an_installed_module() -> None:
    assert resolve_scorer("lorabank.training.scorers:exact_match") is SCORERS["exact_match"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleau", "did you mean 'bleu'"),
        ("perplexty", "did you mean 'perplexity'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("json:", "has no function ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_scorer(name)


def test_a_module_that_lacks_a_library_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs_more needs 'surely_not_installed'"):
        resolve_scorer("needs_more:f")


def test_nothing_to_score_or_the_wrong_shape() -> None:
    scorers = {"exact_match": SCORERS["exact_match"]}
    with pytest.raises(DataError, match="no predictions"):
        score(scorers, [], [])
    with pytest.raises(DataError, match="2 predictions against 1 rows"):
        score(scorers, ["a", "b"], [["a"]])
    with pytest.raises(DataError, match="row 1 has no reference"):
        score(scorers, ["a", "b"], [["a"], []])
    with pytest.raises(ConfigError, match="expected a number"):
        score({"mine:f": lambda predictions, references: {"x": "high"}}, ["a"], [["a"]])


@pytest.mark.parametrize(("name", "library"), [("bleu", "sacrebleu"), ("rouge", "rouge_score")])
def test_a_missing_library_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [key for key in sys.modules if key.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorabank\[eval\]'"):
        SCORERS[name](["a"], [["a"]])


def test_importing_the_scorers_loads_no_scoring_library() -> None:
    heavy = ("torch", "sacrebleu", "rouge_score", "nltk")
    code = f"import sys, lorabank.training.scorers; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_an_own_function_that_fails_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_metric.py").write_text("def bad(predictions, references):\n    return {}['x']\n")
    (tmp_path / "broken_metric.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    name = "failing_metric:bad"
    with pytest.raises(ConfigError, match=r"metric 'failing_metric:bad' failed: KeyError: 'x' \(failing_metric.py:2\)"):
        score({name: resolve_scorer(name)}, ["a"], [["a"]])
    with pytest.raises(ConfigError, match=r"metric 'broken_metric:f': 'broken_metric.py' can't be imported: ZeroDivisionError"):
        resolve_scorer("broken_metric:f")
