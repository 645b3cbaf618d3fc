"""What a run shows, from a recorded sequence of events."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lorabank.training.console import ConsoleListener
from lorabank.training.events import Notice
from lorabank.training.tables import metrics_table
from tests.training.events_for_tests import evaluation, plan, play, result, step


def terminal(width: int) -> Console:
    return Console(
        record=True, width=width, height=40, force_terminal=True, file=io.StringIO(), highlight=False, legacy_windows=False
    )


def shown(listener: ConsoleListener) -> str:
    """The live table as text."""
    paper = Console(record=True, width=listener.console.width, file=io.StringIO(), highlight=False)
    paper.print(listener.render())
    return paper.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table(width: int) -> None:
    listener = ConsoleListener(terminal(width))
    play([listener])
    text = shown(listener)
    listener.close()
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "20/20" in rows["formal"]
    assert "1.310 ▲" in rows["formal"], "a validation loss that turned is marked"
    assert "done" in rows["formal"]
    assert "12/12" in rows["terse"]
    assert "1.050 ▼" in rows["terse"], "the best so far"
    assert "1.23 k" in rows["terse"]
    assert "3.210" in rows["base"]
    assert "…" not in rows["adapter"] + rows["formal"] + rows["terse"], "nothing is cut"
    assert "memory" in text
    assert "checkpoint written" in text
    assert max(map(len, text.splitlines())) <= width
    written = listener.console.export_text()
    assert "! formal: validation loss is rising" in written, "a warning stays above the table"


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_before(width: int) -> None:
    listener = ConsoleListener(terminal(width))
    listener.on_start(plan())
    listener.close()
    text = listener.console.export_text()
    assert "org/Tiny-135M, 135 M parameters, fp32 on cpu" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("terse"))
    for part in ("16", "4.88 M", "3.6 %", "1,600", "12", "5.37e-4"):
        assert part in line
    assert "learning rate 5.37e-4: 10 × the full fine-tuning rate" in text
    assert "…" not in text


def test_a_bar_during_an_evaluation() -> None:
    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    listener.on_busy("evaluating formal", 3, 10)
    assert "evaluating formal" in shown(listener)
    assert "3/10" in shown(listener)
    listener.on_busy("evaluating formal", 10, 10)
    assert "evaluating" not in shown(listener)
    listener.close()


def test_the_result(tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(100))
    play([listener])
    listener.on_end(result(tmp_path / "out"))
    text = listener.console.export_text()
    assert "finished after 5m 45s" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["base"][1:3] == ["3.210", "4.2"]
    assert rows["terse"][1:3] == ["1.050", "30.1"]
    flat = text.replace("\n", "")
    out = tmp_path / "out"
    serve = f"vllm serve org/Tiny-135M --enable-lora --max-lora-rank 16 --lora-modules formal={out}/formal terse={out}/terse"
    assert serve in flat
    assert f"lorabank chat {out} --adapters formal,terse,base" in flat


def test_an_adapter_that_went_nan_is_not_offered(tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(120))
    play([listener])
    ended = result(tmp_path)
    adapters = {**ended.adapters, "terse": replace(ended.adapters["terse"], status="stopped: not finite")}
    listener.on_end(replace(ended, adapters=adapters))
    text = listener.console.export_text()
    assert "formal=" in text and "terse=" not in text


def test_a_row_of_the_base_for_each_set_of_rows(tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(120))
    own = {"formal": {"loss": 3.21}, "terse": {"loss": 4.5}}
    listener.on_end(replace(result(tmp_path), base_metrics={}, base_metrics_of=own))
    lines = listener.console.export_text().splitlines()
    assert any(line.strip().startswith("base (formal's rows)") and "3.210" in line for line in lines)
    assert any(line.strip().startswith("base (terse's rows)") and "4.500" in line for line in lines)


def test_a_rank_that_vllm_refuses_is_merged(tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    listener.on_end(result(tmp_path, r=1024))
    text = listener.console.export_text()
    assert "vllm serve" not in text
    assert "vLLM can't serve these adapters as they are" in text
    assert "terse: rank 1024 is above vLLM's largest, 512; merge it (lorabank merge)" in " ".join(text.split())


def test_dora_is_merged_for_vllm(tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    listener.on_end(result(tmp_path, use_dora=True))
    text = listener.console.export_text()
    assert "vllm serve" not in text
    assert "vLLM doesn't read DoRA; merge it (lorabank merge)" in text


@pytest.mark.parametrize("setting", [{"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}])
def test_ranks_that_differ_between_layers_need_a_new_vllm(setting: dict[str, object], tmp_path: Path) -> None:
    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    listener.on_end(result(tmp_path, **setting))
    text = listener.console.export_text()
    assert "vllm serve" in text
    assert "vLLM 0.32" in text
    assert f"lorabank export {tmp_path}" in text
    assert "--to vllm --output" in text


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    from dataclasses import replace

    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    end = replace(result(tmp_path), interrupted=True, resume_command="lorabank train out/e2e --resume")
    listener.on_end(end)
    text = listener.console.export_text()
    assert "interrupted after" in text
    assert "lorabank train out/e2e --resume" in text
    assert "vllm" not in text


def test_without_a_terminal_there_are_plain_lines() -> None:
    out = io.StringIO()
    listener = ConsoleListener(Console(file=out, width=80), plain_every=3600)
    play([listener])
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert sum("tokens/s" in line for line in lines) == 1, "one line an interval, the first step at once"
    assert any("evaluation of formal after step 15: loss 1.310, bleu 30.1 (rising)" in line for line in lines)
    assert any(line == "! formal: validation loss is rising" for line in lines)
    every = ConsoleListener(Console(file=io.StringIO(), width=80), plain_every=0)
    play([every])


def test_markup_in_names_and_texts_is_shown_as_it_is() -> None:
    listener = ConsoleListener(terminal(100))
    listener.on_start(plan())
    listener.on_notice(Notice(text="row [/bold] of data[0] was dropped", level="warning"))
    listener.on_step(step("formal", 1))
    listener.on_eval(evaluation("formal", 1, float("nan"), best=False))
    assert "nan" in shown(listener)
    listener.close()
    assert "row [/bold] of data[0] was dropped" in listener.console.export_text()


def test_scores_are_never_cut_off() -> None:
    """More metrics than fit side by side: a row each."""
    numbers = {
        "loss": 1.234,
        "perplexity": 12.34,
        "bleu": 53.2,
        "chrf": 70.1,
        "rouge1": 0.71,
        "rouge2": 0.43,
        "exact_match": 0.25,
    }
    scores = {"base": numbers, "loraplus": {name: value / 2 for name, value in numbers.items()}}
    for width in (40, 60, 80, 120):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(metrics_table(scores, width=width))
        text = console.export_text()
        assert "…" not in text
        assert all(part in text for part in ("loraplus", "perplexity", "exact match", "1.234", "0.617", "53.2", "26.6"))
