"""The GPU benchmarks as far as a machine without a GPU can tell: their table, their files, their check; and README.md's table."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from lorabank.kernels import fp8
from lorabank.kernels.gpu import flash
from tests.docs.gpu_rows import GPU, HEAD, elsewhere, families, line_of, ours, peers, step
from tests.docs.pages import ROOT
from tests.kernels.gpu.problems import bf16_dots  # noqa: F401
from tests.kernels.gpu.stand_in import stand_in

sys.path.insert(0, str(ROOT / "benchmarks"))  # they are scripts, which import each other by name

gpu_all = importlib.import_module("gpu_all")
gpu_attention = importlib.import_module("gpu_attention")
gpu_bordered = importlib.import_module("gpu_bordered")
gpu_check = importlib.import_module("gpu_check")
gpu_fp8 = importlib.import_module("gpu_fp8")
gpu_kernels = importlib.import_module("gpu_kernels")
gpu_model = importlib.import_module("gpu_model")
gpu_peers = importlib.import_module("gpu_peers")
gpu_power = importlib.import_module("gpu_power")
gpu_problems = importlib.import_module("gpu_problems")
gpu_results = importlib.import_module("gpu_results")
gpu_table = importlib.import_module("gpu_table")
gpu_training = importlib.import_module("gpu_training")
gpu_longest = importlib.import_module("gpu_longest")

TINY = {"hidden": 32, "inner": 48, "heads": 4, "kv_heads": 2, "vocabulary": 97}


@pytest.mark.parametrize("page", gpu_table.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_results_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    block = gpu_table.PAGES[page].block()
    assert block.startswith(("| work |", "On an ", "Beside a copy", "| file |", gpu_table.NOTHING))
    assert gpu_table.put_between(text, block) == text, "run python benchmarks/gpu_table.py --readme"
    assert len(text.splitlines()) <= 160
    assert [line for line in text.splitlines() if len(line) > 145 and not line.startswith("|")] == []


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
        (236.0, 27.0, "done, 3.6% short of the goal of 18,000 tok/s"),
        (220.0, 35.0, "no: 35 GiB, 25% above 28 GiB"),
    ],
)
def test_verdicts(ms: float, peak: float, met: str) -> None:
    assert line_of(gpu_table.table([ours(step("one-2x2048", ms, peak=peak))]), "bf16, 2 × 2048")[5] == met


def test_eight_single_steps_stand_beside_the_joint_one() -> None:
    text = gpu_table.table([ours(step("eight-8x512", 240.0)), peers({**step("one-1x512", 210.0, 512), "impl": "unsloth"})])
    assert line_of(text, "eight adapters")[1:] == [
        "unsloth, 8 steps: 1,680 ms", "240.0 ms · 17,067 tok/s · 27.0 GiB", "7.00 × as fast",
        "≤ 250 ms (6.7 × the anchor's 8 × 210 ms)", "yes",
    ]  # fmt: skip
    assert line_of(text, "one adapter, 1 × 512")[1:3] == ["unsloth: 210.0 ms · 2,438 tok/s · 27.0 GiB", "not run"]


def test_a_target_that_is_a_ratio_too_is_judged_by_its_time_and_a_note_has_todays_ratio() -> None:
    run = ours(step("eight-8x512", 240.0))
    text = gpu_table.table([run, peers({**step("one-1x512", 180.0, 512), "impl": "unsloth"})])
    assert line_of(text, "eight adapters")[3:] == ["6.00 × as fast", "≤ 250 ms (6.7 × the anchor's 8 × 210 ms)", "yes"]
    note = " ".join(text.split("\n\n")[1].split())
    assert "against the peer as it ran here, 8 × 180.0 ms, ours is 6.00 × as fast." in note
    assert "judged by its time" not in gpu_table.table([run])
    assert "judged by its time" not in gpu_table.table(
        [elsewhere(run), peers({**step("one-1x512", 180.0, 512), "impl": "unsloth"})]
    )


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ({"gpu_uuid": "a", "commit": "1"}, {"gpu_uuid": "a", "commit": "2"}, True),
        ({"gpu_uuid": "a", "commit": "1"}, {"gpu_uuid": "b", "commit": "1"}, False),
        ({"gpu_uuid": "a", "date": "2026-01-02"}, {"gpu_uuid": "a"}, False),
        ({"gpu_uuid": None}, {"gpu_uuid": "b"}, True),
        ({}, {}, True),
        ({}, {"gpu_uuid": "b", "commit": "def"}, False),
        ({}, {"date": "2026-01-02"}, False),
        ({"commit": "unknown"}, {"commit": "unknown"}, False),
    ],
)
def test_a_peer_of_another_session_is_called_that(mine: dict[str, Any], theirs: dict[str, Any], same: bool) -> None:
    run = {**ours(step("one-1x512", 40.0, 512)), **mine}
    other = {**peers({**step("one-1x512", 200.0, 512), "impl": "unsloth"}), **theirs}
    assert line_of(gpu_table.table([run, other]), "one adapter, 1 × 512")[3] == (
        "5.00 × as fast" if same else "5.00 × as fast (peer of another run)"
    )


def test_the_peer_of_our_own_session_counts_before_a_later_one() -> None:
    run, peer = ours(step("one-1x512", 40.0, 512)), peers({**step("one-1x512", 200.0, 512), "impl": "unsloth"})
    later = {**peers({**step("one-1x512", 160.0, 512), "impl": "unsloth"}), "commit": "def"}
    for runs in ([run, peer, later], [later, run, peer]):
        assert line_of(gpu_table.table(runs), "one adapter, 1 × 512")[3] == "5.00 × as fast"
    assert line_of(gpu_table.table([run, later]), "one adapter, 1 × 512")[3] == "4.00 × as fast (peer of another run)"


def test_notes_say_which_run_each_peer_is_of() -> None:
    peer, other = ({**step(item, 300.0), "impl": "unsloth"} for item in ("one-2x2048", "one-1x512"))
    run = ours(step("one-2x2048", 250.0), step("one-1x512", 50.0, 512))
    assert f"Peers: {GPU}, torch 2.11.0, commit abc, 2026-01-01.\n" in gpu_table.table([run, peers(peer, other)]) + "\n"
    text = gpu_table.table([run, peers(peer), {**peers(other), "commit": "def"}])
    assert f"Peers: {GPU}, torch 2.11.0, commit abc, 2026-01-01 (one-2x2048)." in text
    assert f"Peers: {GPU}, torch 2.11.0, commit def, 2026-01-01 (one-1x512, eight-8x512)." in text


def test_a_card_is_named_alike_by_torch_and_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    number = "1a2b3c4d-0000-1111-2222-333344445555"
    assert gpu_results.plain_uuid(number) == gpu_results.plain_uuid(f"GPU-{number.upper()}\n") == number
    assert gpu_results.plain_uuid("No devices were found") is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho GPU-{number}\n")
    tool.chmod(0o755)
    if not torch.cuda.is_available():
        monkeypatch.setenv("PATH", str(tmp_path))
        assert gpu_results.Results.start("kernels", None, gpu=GPU, revision="abc").record["gpu_uuid"] == number
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        assert gpu_results.Results.start("kernels", None, gpu=GPU, revision="abc").record["gpu_uuid"] is None
    properties = type("Properties", (), {"uuid": f"GPU-{number}"})()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: properties)
    assert gpu_results.gpu_uuid() == number


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
    assert line_of(text, "the same, whole step (16 blocks)")[5].startswith(
        "no: 1.30 ×, 18% above 1.10 ×; in the way: AdamW's bytes"
    )


@pytest.mark.parametrize(
    ("ms", "peak", "met"), [(400.0, 9.0, "yes"), (500.0, 11.0, "no: slower and more memory, 11.00 against 10.00 GiB")]
)
def test_the_target_that_is_the_peer_itself(ms: float, peak: float, met: str) -> None:
    item = "nf4-2x2048-recompute"
    text = gpu_table.table([ours(step(item, ms, peak=peak)), peers({**step(item, 450.0, peak=10.0), "impl": "unsloth-qlora"})])
    assert line_of(text, "4-bit base")[5].split("; in the way")[0] == met
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
        "lowest of 2: outer 4096→1024, r 64", "0.75 of its rate", "≥ 0.85",
        "no: 1 of 2 below; in the way: the latency of a step of their loops, not bytes",
    ]  # fmt: skip
    assert gpu_table.kernel_table([run]).splitlines()[4] == "| outer | 4096→1024 | 64 | 20.0 µs | 15.0 µs | 0.75 |"


def test_a_later_run_of_an_item_counts() -> None:
    runs = [ours(step("one-1x512", 90.0, 512)), ours(step("one-1x512", 50.0, 512))]
    assert line_of(gpu_table.table(runs), "one adapter, 1 × 512")[2].startswith("50.0 ms")


def test_a_time_on_the_targets_gpu_counts_before_a_later_one_elsewhere() -> None:
    there = [ours(step("one-2x2048", 235.0)), peers({**step("one-2x2048", 280.0), "impl": "unsloth"})]
    later = [elsewhere(ours(step("one-2x2048", 200.0))), elsewhere(peers({**step("one-2x2048", 250.0), "impl": "unsloth"}))]
    for runs in ([*there, *later], [*later, *there]):
        work = line_of(gpu_table.table(runs), "bf16, 2 × 2048")
        assert (work[2][:8], work[3]) == ("235.0 ms", "1.19 × as fast")


def test_what_is_judged_beside_its_peer_is_judged_on_any_gpu() -> None:
    item = "nf4-2x2048-recompute"
    runs = [ours(step(item, 400.0, peak=12.0)), peers({**step(item, 450.0, peak=10.0), "impl": "unsloth-qlora"})]
    assert line_of(gpu_table.table(runs), "4-bit base")[5].startswith("no: more memory, 12.00 against 10.00 GiB; in the way: ")
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
    assert gpu_table.recorded(gpu_table.table, [tmp_path / "both.json"]) == printed.strip()
    assert gpu_table.recorded(gpu_table.table, [tmp_path / "none.json"]) == gpu_table.NOTHING


def test_other_families_stand_beside_peft() -> None:
    runs = [families(bert=(20.0, 10.0), vit=(None, 5.0)), {**families(bert=(20.0, 40.0)), "failures": {"vit": "", "whisper": ""}}]
    text = gpu_table.further(runs)
    assert line_of(text, "bert")[2:6] == ["20.0 ms", "30.0 ms", "40.0 ms", "0.50 × as fast"]  # of two runs the later one
    assert line_of(text, "vit")[2:6] == ["not run", "30.0 ms", "5.0 ms", "–"]
    assert "No number yet: whisper." in text
    other = {**families(bert=(20.0, 5.0)), "gpu": "NVIDIA H200"}
    assert gpu_table.family_table([*runs, other]).startswith(text)  # another GPU's are beside, not instead
    assert line_of(gpu_table.family_table([other]), "bert")[5] == "4.00 × as fast"
    assert gpu_table.further([ours(step("one-2x2048", 250.0))]) == ""
    assert "bert" not in gpu_table.table([*runs, ours(step("one-2x2048", 250.0))])


def test_other_gpus_have_a_table_of_their_own() -> None:
    there = {"gpu": "NVIDIA H200", "commit": "def"}
    theirs = peers({**step("one-2x2048", 300.0), "impl": "unsloth", "gpu": "NVIDIA H200"}) | there
    runs = [ours(step("one-2x2048", 250.0)), ours(step("one-2x2048", 200.0)) | there, theirs]
    assert line_of(gpu_table.table(runs), "bf16, 2 × 2048")[2].startswith("250.0 ms")
    text = gpu_table.further(runs)
    assert text.startswith("On an NVIDIA H200 (the targets are for an H100):")
    assert line_of(text, "bf16, 2 × 2048")[2:] == ["200.0 ms · 20,480 tok/s · 27.0 GiB", "1.50 × as fast"]
    assert "met?" not in text
    assert "not run" not in text
    kernel = {"kernel": "outer", "shape": "4096→1024", "rank": 64, "us": 20.0, "beside_us": 10.0, "fraction": 0.5}
    here = {"kind": "kernels", **HEAD, "check": {"passed": True}, "rows": [kernel]}
    runs += [here, {**here, **there, "rows": [kernel | {"kernel": "fold", "fraction": 0.2}, kernel | {"fraction": 0.9}]}]
    assert line_of(gpu_table.table(runs), "hot kernels")[2:4] == ["lowest of 1: outer 4096→1024, r 64", "0.50 of its rate"]
    assert line_of(gpu_table.further(runs), "hot kernels")[2].startswith("1 of 2 at ≥ 0.85; lowest of 2: fold")


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


def _script(folder: Path, name: str, text: str) -> None:
    """A stand-in for one of the benchmarks: it gets the arguments and may write its --output."""
    start = "import json, sys\nfrom pathlib import Path\nout = Path(sys.argv[sys.argv.index('--output') + 1])\n"
    (folder / name).write_text(start + text, encoding="utf-8")


def _writes(run: dict[str, Any]) -> str:
    """Python that writes a run, with the arguments in place of its commit."""
    return f"out.write_text(json.dumps({run!r} | {{'commit': ' '.join(sys.argv[1:])}}))\n"


def test_one_command_runs_all_parts_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_all, "HERE", tmp_path)
    monkeypatch.setattr(gpu_all, "peers_missing", lambda args: None)
    _script(tmp_path, "gpu_training.py", _writes(ours(step("one-2x2048", 250.0))) + "sys.exit(1)\n")
    _script(tmp_path, "gpu_peers.py", _writes(peers({**step("one-2x2048", 300.0), "impl": "unsloth"})))
    _script(tmp_path, "gpu_kernels.py", "sys.exit('kernels disagree')\n")
    _script(tmp_path, "gpu_families.py", _writes(families(bert=(20.0, 10.0))))
    folder = tmp_path / "out"
    line = ["--output", str(folder), "--tokenizer", "words", "--items", "one-2x2048", "--commit", "abc"]
    assert gpu_all.main(line) == 1
    printed = capfd.readouterr().out
    assert "gpu_training.py ended with 1; what it measured until then counts" in printed
    assert "gpu_kernels.py ended with 1 and left no results" in printed
    runs = gpu_results.load_runs([folder / "all.json"])
    assert [(run["kind"], run["commit"]) for run in runs] == [
        ("training", f"--output {folder / 'training.json'} --commit abc --items one-2x2048"),
        ("peers", f"--output {folder / 'peers.json'} --commit abc --tokenizer words"),
        ("families", f"--output {folder / 'families.json'} --commit abc"),
    ]
    assert gpu_table.table(runs) in printed
    assert line_of(printed, "bert")[5] == "2.00 × as fast"


def test_peers_that_are_not_here_are_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_all, "HERE", tmp_path)
    _script(tmp_path, "gpu_training.py", _writes(ours(step("one-2x2048", 250.0))))
    _script(tmp_path, "gpu_kernels.py", _writes({"kind": "kernels", **HEAD, "check": {"passed": True}, "rows": []}))
    _script(tmp_path, "gpu_families.py", _writes(families()))
    assert gpu_all.main(["--output", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    assert "gpu_peers.py skipped: no --tokenizer" in printed
    assert line_of(printed, "bf16, 2 × 2048")[1] == "not run"
    monkeypatch.setattr(gpu_all.importlib.util, "find_spec", lambda name: None)
    args = gpu_all.parser().parse_args(["--output", "out", "--tokenizer", "words"])
    assert gpu_all.peers_missing(args) == "unsloth isn't installed"


def test_results_of_an_earlier_call_are_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "HERE", tmp_path)
    (tmp_path / "all.json").write_text("{}")
    (tmp_path / "training.json").write_text(json.dumps(ours(step("one-2x2048", 250.0))))
    for name in ("gpu_training.py", "gpu_kernels.py", "gpu_families.py"):
        _script(tmp_path, name, "sys.exit(1)\n")
    assert gpu_all.main(["--output", str(tmp_path)]) == 1
    assert not (tmp_path / "all.json").exists()


@pytest.mark.parametrize("name", ["training", "peers", "kernels"])
def test_the_parts_take_what_the_one_command_gives_them(name: str) -> None:
    module = importlib.import_module(f"gpu_{name}")
    more = {"training": ["--items", "one-1x512"], "peers": ["--tokenizer", "x", "--peers", "all"], "kernels": []}[name]
    assert module.parser().parse_args(["--output", "out.json", "--commit", "abc", *more]).commit == "abc"


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


def _outcomes(**asked: Any) -> dict[str, Any]:
    shape = gpu_model.Shape(layers=2, **TINY)
    found = gpu_check.check(shape, torch.device("cpu"), compiled=False, adapters=3, tokens=16, **asked)
    return {one.name: one for one in found}


def test_the_check_passes_on_a_right_path() -> None:
    found = _outcomes(offloaded=["bf16"], mixed=True, packed=True, long=40)
    assert list(found) == ["peft", "recompute", "offload", "joint", "long", "packed", "mixed"]
    assert all(outcome.passed for outcome in found.values()), "\n".join(map(str, found.values()))


@pytest.mark.slow
def test_the_check_is_told_what_the_items_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_training, "check", lambda shape, device, **more: asked.append(more) or [])
    for items in (
        ["one-2x2048"],
        ["one-4x2048-recompute", "many-64"],
        ["fp8-2x2048", "nf4-2x2048-recompute"],
        ["packed-1x512"],
    ):
        gpu_training.run_checks(gpu_training.parser().parse_args(["--items", *items]), gpu_model.Shape(layers=2, **TINY))
    assert asked == [
        {"storages": [], "offloaded": [], "mixed": False, "packed": False, "long": 2048},
        {"storages": [], "offloaded": ["bf16"], "mixed": True, "packed": False, "long": 2048},
        {"storages": ["fp8", "nf4"], "offloaded": ["nf4"], "mixed": False, "packed": False, "long": 2048},
        {"storages": [], "offloaded": [], "mixed": False, "packed": True, "long": 2048},
    ]


@pytest.mark.slow
def test_a_pass_that_keeps_nothing_on_the_host_is_no_check_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    offload = importlib.import_module("lorabank.engine.offload").Offload
    monkeypatch.setattr(offload, "around", lambda self, recompute, lasting=None: recompute)
    assert not _outcomes(offloaded=["bf16"])["offload"].passed


@pytest.mark.variants(1)
@pytest.mark.parametrize("wrong", ["offload", "mixed", "packed"])
def test_a_wrong_form_fails_its_own_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.our_gradients

    def spoiled(training: Any, ids: Any, names: Any, passes: int, packed: int = 1) -> Any:
        found = copy.deepcopy(right(training, ids, names, passes, packed))
        ranks = {len(p) for p in training.bank.parameters(names[-1])}
        forms = {
            "offload": training.engine.activation_offloading,
            "mixed": len(names) > 1 and 16 not in ranks,
            "packed": packed > 1,
        }
        if forms[wrong]:
            next(reversed(found[names[-1]][1].values())).mul_(1.5)
        return found

    monkeypatch.setattr(gpu_check, "our_gradients", spoiled)
    found = _outcomes(offloaded=["bf16"], mixed=True, packed=True)
    assert [name for name, outcome in found.items() if not outcome.passed] == [wrong]


def test_the_check_fails_on_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.our_gradients

    def wrong(*args: Any) -> Any:
        found = copy.deepcopy(right(*args))
        _, gradients = found[next(iter(found))]
        next(reversed(gradients.values())).mul_(1.5)
        return found

    monkeypatch.setattr(gpu_check, "our_gradients", wrong)
    assert not _outcomes()["peft"].passed


def _quantised_outcome(storage: str, **asked: Any) -> Any:
    """The check of one storage of the base."""
    shape = gpu_model.Shape(layers=2, **{**TINY, "hidden": 64, "inner": 128})  # bitsandbytes' blocks are of 64
    found = gpu_check.check(shape, torch.device("cpu"), compiled=False, storages=[storage], adapters=2, tokens=16, **asked)
    return {one.name: one for one in found}[storage]


def _with_units(model: Any, storage: str) -> Any:
    """The model as a GPU with fp8 units computes it."""
    return gpu_check.emulated(model)


WRONG = ("mlp.up_proj.weight_scale", "mlp.down_proj.weight_t_scale")
"""A weight as the forward product reads it, and one as dx does."""


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, WRONG[0], *(pytest.param(wrong, marks=pytest.mark.long) for wrong in WRONG[1:])])
def test_fp8_is_held_to_its_emulated_twin(wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_wrong(model: Any, storage: str) -> Any:
        model = _with_units(model, storage)
        if wrong is not None:
            model.model.layers[0].get_parameter(wrong).data.mul_(1.2)
        return model

    monkeypatch.setattr(gpu_check, "quantized", with_wrong)
    outcome = _quantised_outcome("fp8")
    assert outcome.passed == (wrong is None), outcome
    assert outcome.numbers["gradient_cosine"] > gpu_check.STORAGE_COSINE  # which doesn't see it


@pytest.mark.long
def test_fp8_without_rounded_activations_is_not_what_units_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "quantized", lambda model, storage: model)
    assert not _quantised_outcome("fp8").passed


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


@pytest.mark.long
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


@pytest.mark.slow
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


# ---- kernels, through Triton's interpreter -------------------------------------------------------------------------------------


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for the interpreter."""
    for name, size in {"TOKENS": 70, "HIDDEN": 96, "INNER": 160}.items():
        monkeypatch.setattr(gpu_bordered, name, size)
    for name, size in {"TOKENS": 33, "HEADS": 4, "KEY_HEADS": 2, "FEATURES": 64}.items():
        monkeypatch.setattr(gpu_attention, name, size)
    monkeypatch.setattr(gpu_kernels, "HIDDEN", 96)
    monkeypatch.setattr(gpu_kernels, "JOINED", (96, 32, 32))


@pytest.fixture
def e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts numbers off where GPUs round them."""
    if torch.cuda.is_available():
        return
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == interpreter.tl.float32 and target == interpreter.tl.float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(data)).to(fp8.E4M3).view(torch.uint8).numpy()
        if source == interpreter.tl.float32 and target == interpreter.tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def wrong_in(pairs: Any) -> list[str]:
    """What is further from what is expected of it than benchmarks allow."""
    return [line for name, found, value in pairs for line in gpu_problems.disagreements({name: found}, {name: value}, "here")]


@pytest.mark.parametrize("slots", [1, 2])
def test_kernels_with_borders_are_checked_for_one_two_and_three_layers(
    slots: int, small: None, e4m3: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = gpu_bordered.Mlp.make(16, slots, device)
    names = {name for name, _, _ in gpu_bordered.found_and_expected(p)}
    timed = {name for name, _, _ in gpu_bordered.timings(p)}
    assert timed <= names | {"middle"}
    assert ("widen, three layers" in timed) == (slots == 1)
    assert wrong_in(gpu_bordered.found_and_expected(p)) == []
    right = gpu_bordered.bordered.Group.finish
    monkeypatch.setattr(gpu_bordered.bordered.Group, "finish", lambda self, *a: (1.1 * right(self, *a)[0], right(self, *a)[1]))
    wrong = {line.split(" at ")[0] for line in wrong_in(gpu_bordered.found_and_expected(p))}
    assert wrong == {name for name in timed if name.startswith("finish")}


@pytest.mark.variants(1)
@pytest.mark.parametrize("slots", [1, 2])
def test_the_kernels_over_an_fp8_base_agree_with_torch(
    slots: int, small: None, e4m3: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = gpu_bordered.Mlp.make(16, slots, device)
    assert wrong_in(gpu_fp8.found_and_expected(p)) == []
    names = {name.split(", rows")[0] for name, _, _ in gpu_fp8.found_and_expected(p)}
    for name, work, moved in gpu_fp8.timings(p):
        work()
        assert moved > 0
        assert any(other.startswith(name.removesuffix(" x")) for other in names), name
    monkeypatch.setattr(gpu_fp8, "noted", lambda rows: (1.5 * rows.abs().amax(-1).float()).view(torch.int32))
    assert wrong_in(gpu_fp8.found_and_expected(p))


@pytest.mark.parametrize("each", [(16,), (64,), (4, 8, 64)])
def test_gradients_of_joined_layers_and_their_sums(each: tuple[int, ...], small: None, device: torch.device) -> None:
    wrong, kernels = gpu_kernels.joined_case(each, device, tokens=132)
    assert wrong == []
    assert [kernel.kernel for kernel in kernels] == ["outer_each"] + ["fold"] * (len(each) == 1)
    assert kernels[0].shape.startswith("96→96 + 32 + 32")
    for kernel in kernels:
        kernel.work()
    several = gpu_problems.Several.make(gpu_problems.Problem.make(96, 96, each, device, 132), (96, 32))
    found, expected = several.found(), several.expected()
    (line,) = gpu_problems.disagreements({**found, "fold": found["fold"] + 0.1}, expected, "here")
    assert line.startswith("fold at here: off by")


def test_frozen_products_are_checked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, kernels = gpu_kernels.product_case(64, 96, device, tokens=8)
    assert wrong == []
    assert [kernel.kernel for kernel in kernels] == ["frozen product", "frozen input gradient"]
    kind = gpu_kernels.STORAGES["linear"]
    skewed = dataclasses.replace(kind, add_forward=lambda y, x, base: kind.add_forward(y, 1.1 * x, base))
    monkeypatch.setattr(gpu_kernels, "STORAGES", {"linear": skewed})
    assert [line.split(" at ")[0] for line in gpu_kernels.product_case(64, 96, device, tokens=8)[0]] == ["frozen product"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels themselves, or not")
def test_attention_is_held_to_its_definition_and_stands_beside_torchs(
    small: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_kernels.left_out(device).keys() == {"attention", "fp8"}
    assert list(gpu_kernels.attention_kernels(device)) == []
    monkeypatch.setattr(flash, "ready", lambda *args: True)
    monkeypatch.setattr(flash, "_interface", stand_in)
    a = gpu_attention.Attention.make(device)
    assert gpu_problems.disagreements(gpu_attention.found(a), gpu_attention.expected(a), "here", 2e-2) == []
    forward, backward = gpu_kernels.attention_kernels(device)
    assert forward.flop == 2 * 2 * 4 * 33 * 33 * 64
    assert backward.flop == 2.5 * forward.flop
    torch.testing.assert_close(forward.work()[0].transpose(1, 2), forward.beside(), rtol=2e-2, atol=2e-2)
    for mine, other in zip(backward.work(), backward.beside(), strict=True):
        torch.testing.assert_close(mine.transpose(1, 2), other, rtol=5e-2, atol=5e-2)
    monkeypatch.setattr(flash, "_interface", lambda: stand_in(0.5))
    assert gpu_problems.disagreements(gpu_attention.found(a), gpu_attention.expected(a), "here", 2e-2)


def test_no_kernel_is_timed_unchecked(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What makes the kernels to time is asked for its check as well, with the same arguments."""
    seen: dict[str, list[Any]] = {}

    def noting(name: str, found: Any) -> Any:
        return lambda *args: seen.setdefault(name, []).append(args[:-1]) or found

    for name in ("product_case", "joined_case", "sibling_case"):
        monkeypatch.setattr(gpu_kernels, name, noting(name, ([name], [name])))
    monkeypatch.setattr(gpu_kernels, "lora_kernels", lambda p: [])
    monkeypatch.setattr(gpu_kernels, "mlp_kernels", lambda slots, device: [])
    monkeypatch.setattr(gpu_kernels, "_wrong_in_mlps", lambda slots, device: [])
    monkeypatch.setattr(gpu_kernels, "disagreements", lambda *args: [])
    monkeypatch.setattr(gpu_kernels, "Problem", mock.MagicMock())
    assert {*gpu_kernels.find_wrong(1, device)} == {"product_case", "joined_case", "sibling_case"}
    checked, seen = {name: sorted(calls) for name, calls in seen.items()}, {}
    list(gpu_kernels.all_kernels(1, device))
    assert {name: sorted(calls) for name, calls in seen.items()} == checked
