"""The GPU benchmarks as far as a machine without a GPU can tell: their table, their files, their check; and README.md's table."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # they are scripts, which import each other by name

gpu_check = importlib.import_module("gpu_check")
gpu_model = importlib.import_module("gpu_model")
gpu_peers = importlib.import_module("gpu_peers")
gpu_power = importlib.import_module("gpu_power")
gpu_results = importlib.import_module("gpu_results")
gpu_table = importlib.import_module("gpu_table")
gpu_training = importlib.import_module("gpu_training")
gpu_longest = importlib.import_module("gpu_longest")

GPU = "NVIDIA H100 80GB HBM3"
HEAD = {"date": "2026-01-01", "commit": "abc", "gpu": GPU, "versions": {"torch": "2.11.0"}}
TINY = {"hidden": 32, "inner": 48, "heads": 4, "kv_heads": 2, "vocabulary": 97}


def step(item: str, ms: float, tokens: int = 4096, peak: float = 27.0) -> dict[str, Any]:
    return {"item": item, "layers": 32, "ms": ms, "tokens_per_s": round(tokens / ms * 1e3), "peak_gib": peak}


def ours(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "training", **HEAD, "check": {"passed": True}, "rows": list(rows)}


def peers(*rows: dict[str, Any]) -> dict[str, Any]:
    named = [{"name": f"{row['impl']}:{row['item']}", "gpu": GPU, **row} for row in rows]
    return {"kind": "peers", **HEAD, "rows": named}


def line_of(text: str, work: str) -> list[str]:
    found = next(line for line in text.splitlines() if line.startswith(f"| {work}"))
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_readme_shows_the_results_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_table.put_between(text, gpu_table.readme_block()) == text, "run python benchmarks/gpu_table.py --readme"


def test_every_item_has_its_line_and_every_peer_its_item() -> None:
    assert {line.item for line in gpu_table.LINES} == set(gpu_training.ITEMS)
    assert {peer.item for peer in gpu_peers.PEERS} - {"peak"} == {line.peer_item for line in gpu_table.LINES} - {None}
    assert set(gpu_training.ITEMS) == {*gpu_training.STEPS, *gpu_training.OTHERS}
    names = [peer.name for peer in gpu_peers.PEERS]
    assert len(names) == len(set(names))


def test_the_fastest_peer_is_compared_with() -> None:
    text = gpu_table.table(
        [
            ours(step("one-2x2048", 250.0)),
            peers({**step("one-2x2048", 425.0), "impl": "peft"}, {**step("one-2x2048", 300.0), "impl": "unsloth"}),
        ]
    )
    work = line_of(text, "bf16, 2 × 2048")
    assert work[1].startswith("unsloth: 300.0 ms")
    assert work[3] == "1.20 × as fast"
    assert work[5] == "no: 16,384 tok/s, 4% below 17,000 tok/s"


@pytest.mark.parametrize(
    ("ms", "peak", "met"),
    [
        (220.0, 27.0, "yes"),
        (236.0, 27.0, "done, short of the goal"),
        (220.0, 35.0, "no: 35 GiB, 25% above 28 GiB"),
    ],
)
def test_verdicts(ms: float, peak: float, met: str) -> None:
    assert line_of(gpu_table.table([ours(step("one-2x2048", ms, peak=peak))]), "bf16, 2 × 2048")[5] == met


def test_eight_single_steps_stand_beside_the_joint_one() -> None:
    text = gpu_table.table([ours(step("eight-8x512", 240.0)), peers({**step("one-1x512", 210.0, 512), "impl": "unsloth"})])
    assert line_of(text, "eight adapters")[1:] == [
        "unsloth, 8 steps: 1,680 ms", "240.0 ms · 17,067 tok/s · 27.0 GiB", "7.00 × as fast", "≤ 250 ms", "yes"
    ]  # fmt: skip
    assert line_of(text, "one adapter, 1 × 512")[1:3] == ["unsloth: 210.0 ms · 2,438 tok/s · 27.0 GiB", "not run"]


def test_what_is_not_run_says_so() -> None:
    text = gpu_table.table([ours(step("one-2x2048", 250.0))])
    assert line_of(text, "bf16, 2 × 2048")[1] == "not run"
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("|")].count("not run") == len(
        gpu_table.LINES
    )


def test_no_ratio_across_gpus_and_no_verdict_for_another() -> None:
    run, peer = ours(step("one-2x2048", 250.0)), {**step("one-2x2048", 300.0), "impl": "unsloth"}
    run["gpu"] = "NVIDIA A100"
    work = line_of(gpu_table.table([run, peers(peer)]), "bf16, 2 × 2048")
    assert work[3] == f"none: the peer ran on {GPU}, ours on NVIDIA A100"
    assert work[5] == "not judged: the target is for an H100"


def test_no_ratio_and_no_verdict_for_a_cut_model() -> None:
    run, peer = ours({**step("one-2x2048", 25.0), "layers": 2}), {**step("one-2x2048", 300.0), "impl": "unsloth"}
    work = line_of(gpu_table.table([run, peers(peer)]), "bf16, 2 × 2048")
    assert (work[3], work[5]) == ("none: not the same model", "not judged: 2 of 32 blocks")


@pytest.mark.parametrize("check", [None, {}, {"passed": False}, {"passed": "yes"}])
def test_an_unchecked_run_gives_no_table(check: Any) -> None:
    with pytest.raises(SystemExit, match="no check recorded as passed"):
        gpu_table.table([{**ours(step("one-2x2048", 250.0)), "check": check}])


def test_ratios_within_our_own_rows() -> None:
    many = {
        "item": "many-64", "layers": 16, "mean_rank": 26, "ms": 110.0, "one_ms": 100.0, "ratio": 1.1, "step_ms": 130.0,
        "one_step_ms": 100.0, "step_ratio": 1.3,
    }  # fmt: skip
    text = gpu_table.table([ours(many)])
    assert line_of(text, "64 adapters")[1:] == [
        "one adapter of rank 26: 100.0 ms", "110.0 ms", "1.100 × the time", "≤ 1.10 ×", "yes"
    ]  # fmt: skip
    assert line_of(text, "the same, whole step (16 blocks)")[5] == "no: 1.30 ×, 18% above 1.10 ×"


@pytest.mark.parametrize(("ms", "peak", "met"), [(400.0, 9.0, "yes"), (500.0, 11.0, "no: slower and more memory")])
def test_the_target_that_is_the_peer_itself(ms: float, peak: float, met: str) -> None:
    item = "nf4-2x2048-recompute"
    text = gpu_table.table([ours(step(item, ms, peak=peak)), peers({**step(item, 450.0, peak=10.0), "impl": "unsloth-qlora"})])
    assert line_of(text, "4-bit base")[5] == met
    assert "no 24 GB card was run" in text
    note = "ours kept what is computed again from on the GPU"
    assert note in text
    assert note not in gpu_table.table([ours({**step(item, ms, peak=peak), "offload": True})])


def test_kernels_are_one_line_and_a_table() -> None:
    rows = [
        {"kernel": "shrink", "shape": "4096→4096", "rank": 16, "us": 20.0, "beside_us": 18.0, "fraction": 0.9},
        {"kernel": "outer", "shape": "4096→1024", "rank": 64, "us": 20.0, "beside_us": 15.0, "fraction": 0.75},
    ]
    run = {"kind": "kernels", **HEAD, "check": {"passed": True}, "rows": rows}
    assert line_of(gpu_table.table([run]), "hot kernels")[2:] == [
        "lowest of 2: outer 4096→1024, r 64", "0.75 of its rate", "≥ 0.85", "no: 1 of 2 below"
    ]  # fmt: skip
    assert gpu_table.kernel_table([run]).splitlines()[2].startswith("| outer | 4096→1024 | 64 | 20.0 µs")


def test_a_later_run_of_an_item_counts() -> None:
    runs = [ours(step("one-1x512", 90.0, 512)), ours(step("one-1x512", 50.0, 512))]
    assert line_of(gpu_table.table(runs), "one adapter, 1 × 512")[2].startswith("50.0 ms")


def elsewhere(run: dict[str, Any]) -> dict[str, Any]:
    """The same on another GPU."""
    return {**run, "gpu": "NVIDIA H200", "rows": [{**row, "gpu": "NVIDIA H200"} for row in run["rows"]]}


def test_a_time_on_the_targets_gpu_counts_before_a_later_one_elsewhere() -> None:
    there = [ours(step("one-2x2048", 235.0)), peers({**step("one-2x2048", 280.0), "impl": "unsloth"})]
    later = [elsewhere(ours(step("one-2x2048", 200.0))), elsewhere(peers({**step("one-2x2048", 250.0), "impl": "unsloth"}))]
    for runs in ([*there, *later], [*later, *there]):
        work = line_of(gpu_table.table(runs), "bf16, 2 × 2048")
        assert (work[2][:8], work[3]) == ("235.0 ms", "1.19 × as fast")


def test_what_is_judged_beside_its_peer_is_judged_on_any_gpu() -> None:
    item = "nf4-2x2048-recompute"
    runs = [ours(step(item, 400.0, peak=12.0)), peers({**step(item, 450.0, peak=10.0), "impl": "unsloth-qlora"})]
    assert line_of(gpu_table.table(runs), "4-bit base")[5] == "no: more memory"
    runs += [elsewhere(ours({**step(item, 350.0, peak=9.0), "offload": True}))]
    work = line_of(gpu_table.table(runs), "4-bit base")
    assert work[3] == f"none: the peer ran on {GPU}, ours on NVIDIA H200"
    assert work[5] == "not judged: no peer to compare with"
    runs += [elsewhere(peers({**step(item, 385.0, peak=10.0), "impl": "unsloth-qlora"}))]
    work = line_of(gpu_table.table(runs), "4-bit base")
    assert work[0].endswith("(on an NVIDIA H200)")
    assert work[3:] == ["1.10 × as fast", "faster, no more memory", "yes"]


def test_files_are_kept_row_by_row_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "ours.json"
    results = gpu_results.Results.start("training", path, gpu=GPU, revision="abc", check={"passed": True})
    assert not path.exists()
    results.add(step("one-2x2048", 220.0))
    assert [row["item"] for row in json.loads(path.read_text())["rows"]] == ["one-2x2048"]
    results.add(step("one-1x512", 50.0, 512))
    theirs = tmp_path / "peers.json"
    theirs.write_text(json.dumps(peers({**step("one-1x512", 210.0, 512), "impl": "unsloth"})))
    assert gpu_table.main([str(path), str(theirs), "--save", str(tmp_path / "both.json")]) == 0
    printed = capsys.readouterr().out
    assert "4.20 × as fast" in printed
    assert gpu_table.readme_block([tmp_path / "both.json"]) == printed.strip()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"kind": "poem", "rows": []}', "not json"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(SystemExit, match=r"x\.json"):
            gpu_results.load_runs([tmp_path / "x.json"])


def test_the_block_is_put_between_the_markers() -> None:
    page = f"above\n{gpu_table.START}\nold\n{gpu_table.END}\nbelow\n"
    assert gpu_table.put_between(page, "new") == page.replace("old", "new")
    with pytest.raises(SystemExit, match="needs one line"):
        gpu_table.put_between("no markers", "new")


def test_peers_lines_are_found_among_others() -> None:
    text = 'Unsloth: patched\n{"impl": "unsloth", "ms": 1}\n{"other": 2}\n[3]\n'
    assert gpu_peers.parse_lines(text) == [{"impl": "unsloth", "ms": 1}]


def test_a_peer_that_fails_or_hangs_is_named() -> None:
    rows, why = gpu_peers.run([sys.executable, "-c", "import sys; sys.exit('no such card')"], 30)
    assert (rows, why) == ([], "ended with 1: no such card")
    rows, why = gpu_peers.run([sys.executable, "-c", "import time; time.sleep(30)"], 0.5)
    assert (rows, why) == ([], "not done in 0 s")


def test_the_peers_command_lines() -> None:
    args = gpu_peers.parser().parse_args(["--layers", "2", "--tokenizer", "somewhere"])
    line = next(p for p in gpu_peers.PEERS if p.impl == "unsloth-qlora").command(args)
    assert line[2:] == (
        "--impl unsloth-qlora --layers 2 --steps 8 --bs 2 --seq 2048 --ckpt 2 --tokenizer somewhere --cap-gib 24.0".split()
    )
    assert {peer.impl for peer in gpu_peers.chosen(None)} == {"unsloth", "unsloth-qlora"}
    assert len(gpu_peers.chosen(["all"])) == len(gpu_peers.PEERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_there_is_a_message() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu_training.main(["--items", "one-1x512"])


def test_items_are_described() -> None:
    row = {**step("one-2x2048", 250.0), "ms_min": 249.0, "ms_max": 252.0, "first_step_s": 40.0, "graph_refused": None}
    assert gpu_training.describe(row) == (
        "one-2x2048             250.0 ms (249.0 to 252.0) · 16,384 tok/s · 27.00 GiB · first step 40.0 s  [32 layers]"
    )


@pytest.mark.parametrize("fit", [9000, 70_000, 99_999, 130_000])
def test_the_longest_row_is_found(fit: int) -> None:
    asked: list[int] = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length <= fit

    low, high = gpu_longest.bisect_longest(fits, 8192, gpu_longest.guess_longest(20.0, 22.0, 70.0), tries=40)
    assert high is not None
    assert low <= fit < high
    assert high - low <= gpu_longest.LONGEST_GRANULE
    assert len(asked) == len(set(asked))
    asked.clear()
    gpu_longest.bisect_longest(fits, 8192, 100_352, tries=3)
    assert len(asked) <= 3
    assert gpu_longest.bisect_longest(fits, 8192, 100_352, tries=3, in_time=lambda: False) == (8192, None)


def test_the_mixed_ranks_have_a_whole_mean() -> None:
    ranks = gpu_training.MIXED_RANKS
    assert (min(ranks), max(ranks)) == (4, 64)
    assert gpu_training.MANY % len(ranks) == 0
    assert sum(ranks) % len(ranks) == 0


def test_useful_work_is_the_peers_count() -> None:
    params = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 128256 * 4096
    useful = 4096 * (2 * params + 32 * 2 * 2048 * 4096) * 2
    assert gpu_model.Shape().useful_tflop(2, 2048) == pytest.approx(useful / 1e12)


def _outcomes() -> dict[str, Any]:
    shape = gpu_model.Shape(layers=2, **TINY)
    return {one.name: one for one in gpu_check.check(shape, torch.device("cpu"), compiled=False, adapters=3, tokens=16)}


def test_the_check_passes_on_a_right_path() -> None:
    found = _outcomes()
    assert list(found) == ["peft", "recompute", "joint"]
    assert all(outcome.passed for outcome in found.values()), "\n".join(map(str, found.values()))


def test_the_check_fails_on_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.our_gradients

    def wrong(*args: Any) -> Any:
        found = copy.deepcopy(right(*args))
        _, gradients = found[next(iter(found))]
        next(reversed(gradients.values())).mul_(1.5)
        return found

    monkeypatch.setattr(gpu_check, "our_gradients", wrong)
    assert not _outcomes()["peft"].passed


def _quantised_outcome(storage: str) -> Any:
    """The check of one storage of the base."""
    shape = gpu_model.Shape(layers=2, **{**TINY, "hidden": 64, "inner": 128})  # bitsandbytes' blocks are of 64
    found = gpu_check.check(shape, torch.device("cpu"), compiled=False, storages=[storage], adapters=2, tokens=16)
    return {one.name: one for one in found}[storage]


def _one_scale(model: Any, storage: str) -> Any:
    """fp8 layers whose weight is the same in both directions, as one in 4 bits is; a CPU rounds no activations."""
    for layer in gpu_model.quantized(model, storage).model.layers.modules():
        if hasattr(layer, "weight_t"):
            scale = layer.weight_scale.max()
            layer.weight.data = (layer.weight.float() * layer.weight_scale[:, None] / scale).to(layer.weight.dtype)
            layer.weight_t.data = layer.weight.t().contiguous()
            layer.weight_scale.fill_(scale)
            layer.weight_t_scale.fill_(scale)
    return model


@pytest.mark.filterwarnings("ignore:base_dtype fp8")
def test_a_base_is_compared_with_the_weights_that_its_codes_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "quantized", _one_scale)
    other_weights = _quantised_outcome("fp8").numbers["gradient_distance"]
    monkeypatch.setattr(gpu_check, "FOUR_BITS", ("fp8",))
    outcome = _quantised_outcome("fp8")
    assert outcome.passed, outcome
    assert outcome.numbers["largest_distance"] < other_weights / 3
    right = gpu_check.dequantize

    def wrong(model: Any, dtype: torch.dtype) -> None:
        right(model, dtype)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.2)

    monkeypatch.setattr(gpu_check, "dequantize", wrong)
    assert not _quantised_outcome("fp8").passed


def test_an_nf4_base_passes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    outcome = _quantised_outcome("nf4")
    assert outcome.passed, outcome


@pytest.mark.filterwarnings("ignore:base_dtype fp8")
def test_a_dequantised_model_computes_the_same() -> None:
    shape = gpu_model.Shape(layers=1, **{**TINY, "hidden": 64, "inner": 128})
    model = gpu_model.quantized(gpu_model.llama(shape, torch.device("cpu")), "fp8").float()
    ids = gpu_model.token_rows(2, 8, shape.vocabulary)
    expected = model(ids).logits
    gpu_check.dequantize(model, torch.float32)
    assert {type(layer).__name__ for layer in model.model.layers.modules() if hasattr(layer, "in_features")} == {"Linear"}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_nvidia_smi_says_of_clock_and_power() -> None:
    lines = [
        "1980, 400.5, 0x0000000000000000",
        "1500, 699.0, 0x0000000000000004",
        "1400, 701.2, 0x0000000000000024",
        "1200, [N/A",
    ]
    found = gpu_power.summary(lines)
    assert found == {"sm_mhz": 1500, "power_w": 699, "power_capped": 0.67, "held_back_by_heat": 0.33}
    assert gpu_power.summary(["[N/A], [N/A], [N/A]", ""]) == {}


def test_an_attention_of_another_package_is_named() -> None:
    run = {**ours(step("one-2x2048", 240.0)), "versions": {"torch": "2.11.0", "flash-attn-4": "4.0.0"}}
    assert f"Ours: {GPU}, torch 2.11.0, flash-attn-4 4.0.0, commit abc, 2026-01-01." in gpu_table.table([run])
