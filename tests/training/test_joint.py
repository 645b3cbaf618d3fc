"""Laws 3 and 4 for whole runs: adapters trained together end as each would alone, and one that goes NaN stops alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import lorabank as lb
import lorabank.training.trainer
from lorabank.engine.results import SlotLoss
from lorabank.errors import ConfigError, DataError
from lorabank.training.events import EvalRecord, Notice, RunResult, StepRecord
from tests.training.children import Quiet
from tests.training.tiny import delta_weights, tiny_model, tiny_rows, write_rows


class Recorder(Quiet):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evals: list[EvalRecord] = []
        self.notices: list[Notice] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_eval(self, record: EvalRecord) -> None:
        self.evals.append(record)

    def on_notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    def of(self, name: str) -> list[dict[str, Any]]:
        """One adapter's steps and evaluations, without the clock."""
        rows = [dataclasses.asdict(r) for r in [*self.steps, *self.evals] if r.adapter == name]
        return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "seconds_left")} for row in rows]


def run(tokenizer: PreTrainedTokenizerFast, adapters: dict[str, Any], **settings: Any) -> tuple[RunResult, Recorder]:
    told = Recorder()
    common = {"batch_size": 4, "learning_rate": 5e-3, "seed": 3, "eval": {"every": 4, "samples": 0}}
    data = settings.pop("data", tiny_rows())
    result = lb.train(
        model=tiny_model(), tokenizer=tokenizer, data=data, adapters=adapters, listeners=[told], **{**common, **settings}
    )
    return result, told


def test_a_slow_first_step_says_nothing_about_the_time_left(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where blocks are compiled in it."""
    forward_backward, passes = lorabank.training.trainer.forward_backward, iter([20.0, *[1.0] * 7])
    clock = [0.0]

    def slow_at_first(*args: Any, **kwargs: Any) -> dict[str, SlotLoss]:
        clock[0] += next(passes)
        return forward_backward(*args, **kwargs)

    monkeypatch.setattr(lorabank.training.trainer, "forward_backward", slow_at_first)
    monkeypatch.setattr(lorabank.training.trainer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    _, told = run(tokenizer, {"a": {}}, max_steps=8)
    assert [record.seconds_left for record in told.steps] == [7 * 20.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def assert_same_adapter(name: str, one: RunResult, other: RunResult) -> None:
    first, second = delta_weights(one.trained[name]), delta_weights(other.trained[name])
    assert first.keys() == second.keys()
    for path, delta in first.items():
        torch.testing.assert_close(delta, second[path], rtol=1e-3, atol=1e-5, msg=path)


def assert_same_records(name: str, one: Recorder, other: Recorder) -> None:
    first, second = one.of(name), other.of(name)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for key, value in a.items():
            if key == "metrics":
                assert value["loss"] == pytest.approx(b[key]["loss"], rel=1e-4)
            elif isinstance(value, float):
                assert value == pytest.approx(b[key], rel=1e-3), key
            else:
                assert value == b[key], key


def test_together_as_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", tiny_rows(24, "thing"))
    adapters: dict[str, Any] = {
        "formal": {"rank": 4, "dropout": 0.2, "max_steps": 13},
        "terse": {"rank": 16, "loraplus_ratio": 8, "gradient_accumulation": 3, "batch_size": 2, "max_steps": 3},
        "other": {"rank": 2, "data": str(own), "epochs": 2, "optimizer": "sgd", "weight_decay": 0.1, "learning_rate": 0.05},
    }
    together, told = run(tokenizer, adapters)
    assert {name: item.steps for name, item in together.adapters.items()} == {"formal": 13, "terse": 3, "other": 12}
    for name, settings in adapters.items():
        alone, only = run(tokenizer, {name: settings})
        assert_same_records(name, told, only)
        assert_same_adapter(name, together, alone)
        assert together.adapters[name].best_step == alone.adapters[name].best_step
    assert [r.step for r in told.evals if r.adapter == "formal"] == [4, 8, 12, 13], "the end of the others doesn't count"


def test_an_adapter_that_goes_nan_stops_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    calm = {"rank": 4, "max_steps": 8}
    wild = {"rank": 4, "max_steps": 8, "learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0}
    both, told = run(tokenizer, {"wild": wild, "calm": calm}, output=str(tmp_path / "out"))
    alone, _ = run(tokenizer, {"calm": calm})
    assert both.adapters["wild"].status == "stopped: not finite"
    assert both.adapters["wild"].steps < 8
    assert both.adapters["calm"].status == "finished"
    assert_same_adapter("calm", both, alone)
    warning = next(notice for notice in told.notices if notice.adapter == "wild" and notice.level == "warning")
    assert "NaN or infinite" in warning.text
    assert "lower learning rate" in warning.text
    assert "set back to its start" in warning.text
    for folder in ("wild", "wild/last"):  # load refuses what isn't finite
        assert all(bool((layer.B == 0).all()) for layer in lb.Adapter.load(tmp_path / "out" / folder).layers.values())
    assert "they are untrained" in (tmp_path / "out" / "wild" / "README.md").read_text(encoding="utf-8")


def test_modules_in_full_are_trained_alone_as_together_saved_and_set_back(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    headed = {"rank": 2, "max_steps": 5, "modules_to_save": ["lm_head"]}
    wild = {**headed, "learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0}
    both, _ = run(tokenizer, {"headed": headed, "wild": wild}, output=str(tmp_path / "out"))
    alone, _ = run(tokenizer, {"headed": headed})
    assert_same_adapter("headed", both, alone)
    start = tiny_model().get_parameter("lm_head.weight")
    found, expected = (result.trained["headed"].modules["lm_head"]["weight"] for result in (both, alone))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, start, atol=1e-3)
    assert both.adapters["wild"].status == "stopped: not finite"
    assert torch.equal(lb.Adapter.load(tmp_path / "out" / "wild").modules["lm_head"]["weight"], start)
    saved = lb.Adapter.load(tmp_path / "out" / "headed" / "last").modules["lm_head"]["weight"]
    assert torch.equal(saved, found)
    again, _ = run(
        tokenizer, {"next": {"init_from": str(tmp_path / "out" / "headed" / "last"), "max_steps": 1, "learning_rate": 1e-9}}
    )
    torch.testing.assert_close(again.trained["next"].modules["lm_head"]["weight"], found)


def test_weights_that_become_infinite_go_back_to_the_last_good_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    wild = {"rank": 4, "max_steps": 2, "learning_rate": 1e37, "weight_decay": 100, "warmup_steps": 0}
    result, told = run(tokenizer, {"wild": wild}, output=str(tmp_path / "out"))
    assert result.adapters["wild"].status == "stopped: not finite"
    assert any("set back to its start" in notice.text for notice in told.notices)
    assert all(bool((layer.B == 0).all()) for layer in result.trained["wild"].layers.values())
    last_step, told = run(tokenizer, {"wild": {**wild, "max_steps": 1}})
    assert last_step.adapters["wild"].status == "stopped: not finite", "no pass comes after the last step to notice it"
    assert (tmp_path / "out" / "samples.md").exists() is False
    assert (tmp_path / "out" / "wild" / "README.md").is_file()


def test_the_best_step_is_kept_and_the_last_beside_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    unlike = write_rows(tmp_path / "odd.jsonl", [{"prompt": "??", "completion": "QWXYZ" + "JKV" * i} for i in range(4)])
    adapters = {
        "hasty": {"rank": 4, "early_stopping": 2, "val_data": str(unlike), "learning_rate": 0.3},
        "steady": {"rank": 4},
    }
    out = tmp_path / "out"
    result, told = run(tokenizer, adapters, output=str(out), epochs=3, eval={"every": 2, "samples": 2, "max_new_tokens": 4})
    hasty = result.adapters["hasty"]
    assert hasty.status == "stopped early"
    evals = [record for record in told.evals if record.adapter == "hasty"]
    best = min(evals, key=lambda record: record.metrics["loss"])
    assert hasty.best_step == best.step == evals[-3].step, "two evaluations without gain"
    assert hasty.best_metrics["loss"] == pytest.approx(best.metrics["loss"], rel=1e-5), "scored again at the end"
    kept, last = lb.Adapter.load(out / "hasty"), lb.Adapter.load(out / "hasty" / "last")
    assert any(not torch.equal(kept.layers[path].B, last.layers[path].B) for path in kept.layers)
    assert all(torch.equal(kept.layers[path].B, result.trained["hasty"].layers[path].B) for path in kept.layers)
    assert result.adapters["steady"].status == "finished"


def test_a_loss_that_is_nan_goes_back_to_the_best_step(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lorabank.training.trainer.forward_backward

    def given(engine: Any, batch: Any, *, steps: dict[str, int]) -> Any:
        found = real(engine, batch, steps=steps)
        nan = {
            n: SlotLoss(tokens=loss.tokens, row_losses=dict.fromkeys(loss.row_losses, float("nan"))) for n, loss in found.items()
        }
        return {n: nan[n] if steps[n] == 5 else loss for n, loss in found.items()}

    monkeypatch.setattr("lorabank.training.trainer.forward_backward", given)
    result, told = run(tokenizer, {"a": {"max_steps": 8}}, output=str(tmp_path / "out"))
    assert (result.adapters["a"].status, result.adapters["a"].steps) == ("stopped: not finite", 5)
    assert any("set back to those of step 4, its best" in notice.text for notice in told.notices)
    best = next(record for record in told.evals if record.best)
    assert result.adapters["a"].best_metrics["loss"] == pytest.approx(best.metrics["loss"], rel=1e-5)
    assert "those of step 4, its best" in (tmp_path / "out" / "a" / "README.md").read_text(encoding="utf-8")


def test_the_base_is_scored_on_each_adapters_own_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_rows(tmp_path / "own.jsonl", tiny_rows(24, "thing"))
    adapters: dict[str, Any] = {"a": {}, "b": {"data": str(tmp_path / "own.jsonl")}, "c": {}}
    settings = {"max_steps": 1, "eval": {"every": 1, "metrics": ["loss", "chrf"], "max_new_tokens": 3}}
    both, told = run(tokenizer, adapters, output=str(tmp_path / "out"), **settings)
    assert [r.adapter for r in told.evals if r.step == 0] == ["base (a and c's rows)", "base (b's rows)"]
    assert both.base_metrics == {}
    assert both.base_metrics_of["a"] == both.base_metrics_of["c"]
    for name in ("a", "b"):
        alone, only = run(tokenizer, {name: adapters[name]}, **settings)
        assert [r.adapter for r in only.evals if r.step == 0] == ["base"]
        assert both.base_metrics_of[name] == pytest.approx(alone.base_metrics)
        assert alone.base_metrics_of == {name: alone.base_metrics}
        card = (tmp_path / "out" / name / "README.md").read_text(encoding="utf-8")
        assert f"| loss | {alone.base_metrics['loss']:.3f} | {alone.adapters[name].best_metrics['loss']:.3f} |" in card
    assert both.base_metrics_of["a"]["loss"] != pytest.approx(both.base_metrics_of["b"]["loss"], rel=1e-3)


def test_a_warning_of_the_bank_becomes_a_notice(tokenizer: PreTrainedTokenizerFast, recwarn: pytest.WarningsRecorder) -> None:
    _, told = run(tokenizer, {"a": {"rank": 100}}, max_steps=1)
    assert [n.text[:23] for n in told.notices if (n.adapter, n.level) == ("a", "warning")] == ["rank 100 is above what "]
    assert not [item for item in recwarn if "rank 100" in str(item.message)]


def test_turning_is_told_once_after_each_best(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an evaluation that gives no number is never the best."""
    losses = iter([3.0, 2.0, 2.02, 2.2, 2.5, 1.9, float("nan"), 1.95])

    def given(engine: object, rows: dict[str, object], **more: object) -> dict[str, float]:
        return {name: next(losses) for name in rows}

    monkeypatch.setattr("lorabank.tasks.text_generation.validation_losses", given)
    monkeypatch.setattr("lorabank.training.run.final_scores", lambda trainer, flag: {})
    result, told = run(tokenizer, {"a": {}}, max_steps=7, eval={"every": 1, "samples": 0})
    assert [notice.text[:43] for notice in told.notices if notice.adapter == "a" and "held out" not in notice.text] == [
        "validation loss has turned (2.2000 after 2.",
        "validation loss has turned (nan after 1.900",
    ]
    assert [record.turned for record in told.evals[1:]] == [False, False, True, True, False, True, False]
    assert (result.adapters["a"].best_step, result.adapters["a"].best_metrics) == (5, {"loss": 1.9})


def test_turning_is_told_with_the_loss_of_an_earlier_step(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best by another score may have a higher loss than the best before: then there is nothing to compare it with yet."""
    given = iter([(1.0, 0.1), (2.0, 0.5), (3.0, 0.4)])

    def scored(task: object, engine: object, rows: dict[str, object], **more: object) -> dict[str, dict[str, float]]:
        return {name: dict(zip(("loss", "score"), next(given), strict=True)) for name in rows}

    monkeypatch.setattr("lorabank.tasks.text_generation.TextGeneration.validate", scored)
    monkeypatch.setattr("lorabank.tasks.text_generation.TextGeneration.metric_names", lambda task, config: ["score"])
    monkeypatch.setattr("lorabank.training.run.final_scores", lambda trainer, flag: {})
    settings = {"max_steps": 2, "eval": {"every": 1, "samples": 0, "best": "score", "metrics": ["loss"]}}
    result, told = run(tokenizer, {"a": {}}, **settings)
    texts = [notice.text for notice in told.notices if notice.adapter == "a" and "held out" not in notice.text]
    assert [text[:54] for text in texts] == ["validation loss has turned (3.0000 after 2.0000 at ste"], texts
    assert result.adapters["a"].best_step == 1


def test_without_evaluations_or_validation_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = {"eval": {"every": 0, "metrics": ["loss", "bleu"]}, "save": {"every": 0}, "max_steps": 3}
    result, told = run(tokenizer, {"a": {}}, output=str(tmp_path / "held"), **settings)
    assert [(r.adapter, r.step) for r in told.evals] == [("base", 0), ("a", 3)]
    assert {"loss", "bleu"} <= result.adapters["a"].best_metrics.keys()
    assert [path.name for path in (tmp_path / "held" / "checkpoints").iterdir()] == ["step-3"]
    result, told = run(tokenizer, {"a": {}}, output=str(tmp_path / "none"), **{**settings, "val_split": 0})
    assert told.evals == []
    assert any("the last step is kept" in notice.text for notice in told.notices)
    assert result.adapters["a"].best_step is None
    one, two = (lb.Adapter.load(tmp_path / "none" / name) for name in ("a", "a/last"))
    assert all(torch.equal(one.layers[path].B, two.layers[path].B) for path in one.layers)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"early_stopping": 2, "val_split": 0}, ConfigError, "needs validation rows"),
        ({"early_stopping": 2, "eval": {"every": 0}}, ConfigError, "Set eval.every above 0"),
        ({"eval": {"metrics": ["bleau"]}}, ConfigError, "did you mean 'bleu'"),
        ({"eval": {"metrics": ["no_such_module:score"]}}, ConfigError, "no module 'no_such_module'"),
        ({"eval": {"metrics": ["bleu"]}, "data": [{"text": f"row {i}"} for i in range(20)]}, DataError, "no validation row"),
        ({"data": []}, DataError, "empty data set"),
        ({"learning_rate": "auto", "optimizer": "lion"}, ConfigError, "Give a number, or use the optimizer adamw"),
        ({"learning_rate": "auto", "optimizer": "sgd"}, ConfigError, "say nothing of sgd"),
        ({"targets": "q_prj"}, lb.LorabankError, "q_prj"),
        ({"report_to": ["wand"]}, ConfigError, "wandb"),
    ],
)
def test_refused_before_anything_is_written(
    settings: dict[str, Any], kind: type[Exception], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run(tokenizer, {"a": {}}, output=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_a_metric_of_ones_own_that_fails_costs_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def good(predictions, references):\n    return {'mean': 1.5}\n\n"
        "def bad(predictions, references):\n    raise RuntimeError('judge is away')\n"
    )
    monkeypatch.chdir(tmp_path)
    good, _ = run(tokenizer, {"a": {}}, max_steps=2, eval={"metrics": ["mine.py:good"], "max_new_tokens": 4})
    assert good.adapters["a"].best_metrics["good_mean"] == 1.5
    bad, told = run(tokenizer, {"a": {}}, max_steps=2, output="out", eval={"metrics": ["mine.py:bad"], "max_new_tokens": 4})
    assert any("judge is away" in notice.text for notice in told.notices)
    assert bad.adapters["a"].best_metrics.keys() == {"loss"}
    assert (tmp_path / "out" / "a" / "README.md").is_file()
