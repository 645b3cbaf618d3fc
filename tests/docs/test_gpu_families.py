"""The benchmark of other families as far as a machine without a GPU can tell: its models, its check, what wrong results give."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # they are scripts, which import each other by name

bench = importlib.import_module("gpu_families")

FAMILIES = ("qwen3", "gemma3", "mistral", "gpt2", "bert", "vit", "whisper")
WORK = (2, 12)
Systems = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # transformers of itself


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def systems_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Systems, Any]:
    """(the systems of a tiny model, what they are given)."""
    like = torch.zeros((), dtype=dtype)
    given = bench.given_to(family, WORK, like)
    return bench.systems_of(family, bench.TINY, given, like.device, dtype), given


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Work as on a GPU with tiny models and a clock that stands. Gives the exit status and the file.

    `ours` is a plain system more, which `spoil` may make a wrong one, by family.
    """
    real = bench.systems_of

    def run(*families: str, spoil: Callable[[str, Any], Any] = lambda name, system: system, more: tuple[str, ...] = ()) -> Any:
        def systems_of(name: str, *given: Any) -> Systems:
            return {**real(name, *given), "ours": spoil(name, real(name, *given)["plain"])}

        def timed(step: Callable[[], Any], steps: int) -> list[float]:
            step()
            return [2.0] * steps

        monkeypatch.setattr(bench, "FAMILIES", {name: dataclasses.replace(bench.TINY, work=(WORK, (2, 7))) for name in FAMILIES})
        monkeypatch.setattr(bench, "systems_of", systems_of)
        monkeypatch.setattr(bench, "timed", timed)
        args = bench.parser().parse_args(["--families", *families, *more])
        results = bench.Results.start("families", tmp_path / "families.json", gpu="none", revision="abc", check={})
        status = bench.run_families(args, results)
        return status, json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))

    return run


def test_the_families_are_those_that_the_page_names() -> None:
    assert tuple(bench.FAMILIES) == FAMILIES
    for family in bench.FAMILIES.values():
        assert [rows > 1 for rows, _ in family.work] == [True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_loss_gradients_and_number_of_parameters_are_ours(family: str) -> None:
    systems, given = systems_of(family)
    (loss, gradients), (other_loss, others) = (systems[name].seen(given) for name in ("plain", "peft"))
    assert systems["plain"].trained == systems["peft"].trained > 0
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert gradients.keys() == others.keys() == systems["plain"].leaves.keys()
    for key, gradient in gradients.items():
        assert float(gradient.norm()) > 0
        assert float((gradient - others[key]).norm()) < 1e-4 * float(gradient.norm()), key


def test_steps_of_both_change_every_leaf() -> None:
    systems, given = systems_of("whisper")
    for name, system in systems.items():
        before = {key: leaf.detach().clone() for key, leaf in system.leaves.items()}
        system.step(given)
        assert all(not torch.equal(before[key], leaf) for key, leaf in system.leaves.items()), name
        assert all(leaf.grad is None for leaf in system.leaves.values()), name


@pytest.mark.slow
def test_the_checks_alone_give_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].split("-")[0] for line in lines] == list(FAMILIES)
    assert all(line.startswith("check ") and "passed" in line for line in lines)


def test_a_table_of_all_that_was_measured(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    status, kept = run("qwen3", "bert")
    assert status == 0
    assert [row["item"] for row in kept["rows"]] == ["family-qwen3-24", "family-qwen3-14", "family-bert-24", "family-bert-14"]
    assert {row["captured"].split(":")[0] for row in kept["rows"]} == {"no"}  # nothing is, on a CPU
    assert kept["check"].keys() == {"qwen3-24", "qwen3-14", "bert-24", "bert-14"}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-6:]
    assert table[0] == "| family | tokens | PEFT ms | ours plain ms | ours ms | × PEFT | × plain | captured |"
    assert table[4] == "| bert | 24 | 2.0 | 2.0 | 2.0 | 1.00 | 1.00 | no: see warnings |"


def _stronger(name: str, system: Any) -> Any:
    if name == "vit":
        with torch.no_grad():
            next(reversed(system.leaves.values())).mul_(1.2)
    return system


def _larger(name: str, system: Any) -> Any:
    return dataclasses.replace(system, trained=system.trained + 1) if name == "vit" else system


def _raising(name: str, system: Any) -> Any:
    if name == "vit":
        raise UserWarning("compile: the blocks stay uncompiled")
    return system


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("spoil", "reason"), [(_stronger, "results disagree"), (_larger, "numbers, not"), (_raising, "stay uncompiled")]
)
def test_a_wrong_result_gives_no_number(
    spoil: Callable[[str, Any], Any], reason: str, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    status, kept = run("vit", "gpt2", spoil=spoil)
    assert status == 1
    assert reason in kept["failures"]["vit"]
    assert {row["family"] for row in kept["rows"]} == {"gpt2"}  # which goes on
    out = capsys.readouterr().out
    assert "vit: no number" in out
    assert "| vit" not in out


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_one_wrong_leaf_is_seen_in_half_precision(wrong: float) -> None:
    systems, given = systems_of("mistral", torch.bfloat16)
    exactly = bench.given_to("mistral", WORK, torch.zeros(()))
    plain, exact = systems["plain"].seen(given), systems["exact"].seen(exactly)
    key = next(iter(plain[1]))
    mine = plain[0], {**plain[1], key: wrong * plain[1][key]}
    found = bench.ratios(mine, plain, exact, torch.bfloat16)
    assert not found[key] <= 1
    assert all(value <= 1 for value in bench.ratios(plain, plain, exact, torch.bfloat16).values())
    missing = plain[0], {k: g for k, g in plain[1].items() if k != key}
    assert not all(value <= 1 for value in bench.ratios(missing, plain, exact, torch.bfloat16).values())


def test_peft_is_left_out_where_it_is_missing(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, kept = run("gpt2")
    assert status == 0
    assert all("peft_ms" not in row and row["ms"] for row in kept["rows"])
    assert "| gpt2 | 24 | – | 2.0 | 2.0 | – | 1.00 |" in capsys.readouterr().out
    bench.main(["--tiny", "--families", "gpt2"])
    assert capsys.readouterr().out.count("peft isn't installed") == 1


def test_no_family_is_begun_after_the_limit(run: Callable[..., Any]) -> None:
    status, kept = run("gpt2", "vit", more=("--seconds", "0"))
    assert status == 2
    assert kept["rows"] == []


def test_times_need_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        bench.main([])
