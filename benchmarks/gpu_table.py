"""The GPU results as a table: work, best peer, ours, ratio, target, met or not. Needs no torch.

    python benchmarks/gpu_table.py ours.json peers.json kernels.json                       # Markdown on standard output
    python benchmarks/gpu_table.py ours.json peers.json --save benchmarks/results/gpu-h100.json   # the runs in one file
    python benchmarks/gpu_table.py --readme           # between the markers in README.md, other GPUs and families in benchmarks/

Of an item that was run twice the later one counts; of one whose target is a time, or a rate of a copy, on the targets' GPU that
one before any other; of a peer's that of our own run's session, else the fastest. A run of ours whose check isn't recorded as
passed is refused; a ratio to a peer that ran on another GPU isn't printed, one to a peer of another session says so; a model cut
to fewer blocks gets no verdict.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_lines import ANYWHERE, KERNELS, LAYERS, LINES, TARGET_GPU, Bound, Line
from gpu_results import load_runs, same_session, save_runs

Row = Mapping[str, Any]

README = Path(__file__).parents[1] / "README.md"
FURTHER = Path(__file__).parent / "README.md"
"""Where other GPUs and families are."""
RESULTS = tuple(Path(__file__).parent / "results" / f"gpu-{card}.json" for card in ("h100", "h200"))
START, END = "<!-- gpu-table:start -->", "<!-- gpu-table:end -->"
NOTHING = "No run of the GPU table is recorded yet."
NOT_RUN = "not run"
LINE = 140
"""Characters of a line of text."""


@dataclass(frozen=True)
class Measured:
    """Everything that the files hold, an item's last row first in line."""

    ours: Mapping[str, tuple[Row, Row]]
    """Item to (run, row)."""
    peers: Mapping[str, Sequence[tuple[Row, Row]]]
    """Item to every peer's, older ones first."""
    kernels: Sequence[tuple[Row, Row]]

    @classmethod
    def of(cls, runs: Sequence[Row]) -> Measured:
        """Sort the rows of all runs. Exits for a run of ours whose check isn't recorded as passed."""
        ours: dict[str, tuple[Row, Row]] = {}
        peers: dict[str, list[tuple[Row, Row]]] = {}
        kernels: dict[tuple[object, ...], tuple[Row, Row]] = {}
        for run in runs:
            if run["kind"] == "families":
                continue
            if run["kind"] != "peers":
                _refuse_unchecked(run)
            for row in run["rows"]:
                if run["kind"] == "training":
                    if row["item"] in ANYWHERE or _at_least_as_near(run, ours.get(row["item"])):
                        ours[row["item"]] = (run, row)
                elif run["kind"] == "peers":
                    peers.setdefault(row["item"], []).append((run, row))
                else:
                    key = tuple(row.get(key) for key in ("kernel", "shape", "rank"))
                    if _at_least_as_near(run, kernels.get(key)):  # of kernels that were never there none counts beside others
                        kernels[key] = (run, row)
        there = [pair for pair in kernels.values() if _on_target(pair[0])]
        return cls(ours, peers, there or list(kernels.values()))

    def best_peer(self, line: Line) -> tuple[Row, Row] | None:
        """(run, row) of the fastest peer of a line's work; None where none was run.

        On the GPU of our own run if any ran there; of a peer that was run twice the row of our run's session, else the fastest.
        """
        found = [(run, row) for run, row in self.peers.get(line.peer_item or "", ()) if row.get("ms")]
        mine = self.ours[line.item][0] if line.item in self.ours else {}
        there = [pair for pair in found if pair[1].get("gpu") == mine.get("gpu")] or found
        named: dict[tuple[str, str], tuple[Row, Row]] = {}
        for pair in sorted(there, key=lambda pair: (same_session(mine, pair[0]), -pair[1]["ms"])):
            named[pair[1]["name"], str(pair[1].get("gpu"))] = pair
        return min(named.values(), key=lambda pair: pair[1]["ms"], default=None)


def _on_target(run: Row) -> bool:
    """Whether a run was on the GPU that the targets are for."""
    return TARGET_GPU in str(run.get("gpu"))


def _at_least_as_near(run: Row, other: tuple[Row, Row] | None) -> bool:
    """Whether a later run counts before one that is known: on the targets' GPU, or where the other wasn't there either."""
    return other is None or _on_target(run) or not _on_target(other[0])


def _refuse_unchecked(run: Row) -> None:
    check = run.get("check")
    if not isinstance(check, Mapping) or check.get("passed") is not True:
        sys.exit(f"a {run['kind']} run of {run.get('date')} has no check recorded as passed: no table is made from it")


# ---- cells --------------------------------------------------------------------------------------------------------------------


def ratio_to_peer(line: Line, run: Row, row: Row, peer: Row | None) -> float | None:
    """The peer's time for the work over ours; None without a peer, on another GPU or of another model."""
    if peer is None or run.get("gpu") != peer.get("gpu") or row.get("layers") != peer.get("layers"):
        return None
    return line.peer_repeats * peer["ms"] / row["ms"]


def cells(line: Line, measured: Measured) -> list[str]:
    """A line of the table."""
    peer_run, peer = measured.best_peer(line) or ({}, None)
    target = "; ".join(map(str, line.bounds)) or ("faster, no more memory" if line.beat_peer else "–")
    if line.anchor_ms is not None:
        target += f" ({_anchored(line):.1f} × the anchor's {line.peer_repeats} × {line.anchor_ms:g} ms)"
    if line.item not in measured.ours:
        return [line.work.replace(" ({layers} blocks)", ""), _peer_cell(line, peer), NOT_RUN, "–", target, "–"]
    run, row = measured.ours[line.item]
    beside = line.beside.format_map(row) if line.beside else _peer_cell(line, peer)
    work = line.work.format_map(row) + ("" if _on_target(run) or not line.anywhere else f" (on an {run.get('gpu')})")
    ratio = _ratio_cell(line, run, row, peer)
    if ratio_to_peer(line, run, row, peer) is not None and not same_session(run, peer_run):
        ratio += " (peer of another run)"
    return [work, beside, line.ours.format_map(row), ratio, target, verdict(line, run, row, peer)]


def _anchored(line: Line) -> float:
    """How much faster than the anchor the target's time is."""
    return line.peer_repeats * (line.anchor_ms or 0) / line.bounds[0].goal


def _peer_cell(line: Line, peer: Row | None) -> str:
    if line.peer_item is None:
        return "–"
    if peer is None:
        return NOT_RUN
    if line.peer_repeats > 1:
        return f"{peer['impl']}, {line.peer_repeats} steps: {line.peer_repeats * peer['ms']:,.0f} ms"
    return f"{peer['impl']}: {peer['ms']:,.1f} ms · {peer['tokens_per_s']:,} tok/s · {peer['peak_gib']:.1f} GiB"


def _ratio_cell(line: Line, run: Row, row: Row, peer: Row | None) -> str:
    if line.ratio is not None:
        return f"{row[line.ratio]:.3f} × {line.what}"
    ratio = ratio_to_peer(line, run, row, peer)
    if ratio is not None:
        return f"{ratio:.2f} × as fast"
    if peer is not None and run.get("gpu") != peer.get("gpu"):
        return f"none: the peer ran on {peer.get('gpu')}, ours on {run.get('gpu')}"
    return "–" if peer is None else "none: not the same model"


def verdict(line: Line, run: Row, row: Row, peer: Row | None) -> str:
    """Whether the target is met, and else by how much it is missed."""
    if not line.bounds and not line.beat_peer:
        return "–"
    if not line.anywhere and not _on_target(run):
        return f"not judged: the target is for an {TARGET_GPU}"
    if row.get("layers") != LAYERS and not line.cut:
        return f"not judged: {row.get('layers')} of {LAYERS} blocks"
    if line.beat_peer:
        return _beats(line, run, row, peer)
    missed = [_missed(bound, row[bound.key]) for bound in line.bounds if not bound.reached(row[bound.key], bound.needed)]
    if missed:
        return f"no: {', '.join(missed)}"
    short = [bound for bound in line.bounds if not bound.reached(row[bound.key], bound.goal)]
    return "done, short of the goal" if short else "yes"


def _missed(bound: Bound, value: float) -> str:
    over = value / bound.needed - 1
    return f"{bound.text.format(value)}, {abs(over):.0%} {'above' if over > 0 else 'below'} {bound.text.format(bound.needed)}"


def _beats(line: Line, run: Row, row: Row, peer: Row | None) -> str:
    ratio = ratio_to_peer(line, run, row, peer)
    if peer is None or ratio is None:
        return "not judged: no peer to compare with"
    failed = ["slower"] * (ratio <= 1) + ["more memory"] * (row["peak_gib"] > peer["peak_gib"])
    return f"no: {' and '.join(failed)}" if failed else "yes"


def kernel_cells(measured: Measured) -> list[str]:
    """All kernels in one line: the slowest of them beside its copy."""
    others = "frozen products" + " and attention" * any(row["kernel"].startswith("attention") for _, row in measured.kernels)
    start = [f"hot kernels beside a copy of the same bytes, {others} beside torch's", "–"]
    if not measured.kernels:
        return [*start, NOT_RUN, "–", str(KERNELS), "–"]
    run, row = min(measured.kernels, key=lambda pair: pair[1]["fraction"])
    lowest = f"lowest of {len(measured.kernels)}: {row['kernel']} {row['shape']}, r {row['rank']}"
    below = sum(not KERNELS.reached(found["fraction"], KERNELS.goal) for _, found in measured.kernels)
    judged = f"no: {below} of {len(measured.kernels)} below" if below else "yes"
    if not _on_target(run):
        judged = f"not judged: the target is for an {TARGET_GPU}"
    return [*start, lowest, f"{row['fraction']:.2f} of its rate", str(KERNELS), judged]


# ---- pages --------------------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def notes(measured: Measured) -> Iterator[str]:
    """What the table must be read with."""
    ours: dict[tuple[str, ...], list[str]] = {}
    for item, (run, _) in measured.ours.items():
        ours.setdefault(_origin(run), []).append(item)
    for origin in dict.fromkeys(_origin(run) for run, _ in measured.kernels):
        ours.setdefault(origin, []).append("kernels")
    yield from _origins("Ours", ours)
    peers: dict[tuple[str, ...], list[str]] = {}
    for line in LINES:
        if (best := measured.best_peer(line)) is not None:
            peers.setdefault(_origin(*best), []).append(line.item)
    yield from _origins("Peers", peers)
    for line in LINES:
        yield from _anchor_note(line, measured)
    if "nf4-2x2048-recompute" in measured.ours:
        yield "NF4: memory was capped on that GPU; no 24 GB card was run."
        if not measured.ours["nf4-2x2048-recompute"][1].get("offload"):
            yield "In that run of NF4 ours kept what is computed again from on the GPU; Unsloth's keeps it on the host."


def _origins(whose: str, found: Mapping[tuple[str, ...], Sequence[str]]) -> Iterator[str]:
    """Where the numbers are from, a line for each origin; which lines of the table, if there are several."""
    for (gpu, version, code, date), items in sorted(found.items()):
        which = f" ({', '.join(items)})" if len(found) > 1 else ""
        yield textwrap.fill(f"{whose}: {gpu}, torch {version}, commit {code}, {date}{which}.", LINE, break_on_hyphens=False)


def _anchor_note(line: Line, measured: Measured) -> Iterator[str]:
    """That a target which the issue gives as a ratio too is judged by its time, and what the ratio is to the peer as it ran."""
    best = measured.best_peer(line)
    if line.anchor_ms is None or best is None or line.item not in measured.ours:
        return
    peer = best[1]
    ratio = ratio_to_peer(line, *measured.ours[line.item], peer)
    if ratio is not None:
        yield textwrap.fill(
            f"{line.item}: judged by its time. {_anchored(line):.1f} × was that time's ratio to {line.peer_repeats} × "
            f"{line.anchor_ms:g} ms of the peer when the target was set; against the peer as it ran here, {line.peer_repeats} × "
            f"{peer['ms']:,.1f} ms, ours is {ratio:.2f} × as fast.",
            LINE,
            break_on_hyphens=False,
        )


def _origin(run: Row, row: Row | None = None) -> tuple[str, ...]:
    gpu = run.get("gpu") or (row or {}).get("gpu")
    versions = run.get("versions", {})
    flash = f", flash-attn-4 {versions['flash-attn-4']}" if "flash-attn-4" in versions else ""
    return str(gpu), f"{versions.get('torch', '?')}{flash}", str(run.get("commit")), str(run.get("date"))


def table(runs: Sequence[Row]) -> str:
    """The comparison and its notes."""
    measured = Measured.of(runs)
    header = ("work", "best peer", "ours", "ratio", "target", "met?")
    rows = [*(cells(line, measured) for line in LINES), kernel_cells(measured)]
    return markdown(header, rows) + "\n\n" + "\n".join(notes(measured))


def kernel_table(runs: Sequence[Row]) -> str:
    """Every kernel and shape, the slowest first; empty without such a run."""
    found = sorted((row for _, row in Measured.of(runs).kernels), key=lambda row: row["fraction"])
    rows = [
        [
            row["kernel"],
            row["shape"],
            str(row["rank"]),
            f"{row['us']:.1f} µs",
            f"{row['beside_us']:.1f} µs",
            f"{row['fraction']:.2f}",
        ]
        for row in found
    ]
    return markdown(("kernel", "shape", "rank", "ours", "beside", "fraction"), rows) if rows else ""


def elsewhere(runs: Sequence[Row]) -> str:
    """For each other GPU a table of ours beside its peers there, without a verdict; empty where there is none."""
    known = sorted({str(run.get("gpu")) for run in runs if run.get("gpu") and not _on_target(run)})
    parts: list[str] = []
    for gpu in known:
        measured = Measured.of([run for run in runs if run.get("gpu") == gpu])
        here = [line for line in LINES if line.item in measured.ours and not line.anywhere]
        if not here and not measured.kernels:
            continue
        rows = [cells(line, measured)[:4] for line in here]
        if measured.kernels:
            start, peer, lowest, rate, *_ = kernel_cells(measured)
            reached = sum(KERNELS.reached(row["fraction"], KERNELS.goal) for _, row in measured.kernels)
            rows.append([start, peer, f"{reached} of {len(measured.kernels)} at {KERNELS}; {lowest}", rate])
        parts += [f"On an {gpu} (the targets are for an {TARGET_GPU}):", markdown(("work", "best peer", "ours", "ratio"), rows)]
        ours = {line.item: measured.ours[line.item] for line in here}
        peers = {name: rows for name, rows in measured.peers.items() if any(line.peer_item == name for line in here)}
        parts.append("\n".join(notes(replace(measured, ours=ours, peers=peers))))
    return "\n\n".join(parts)


def family_table(runs: Sequence[Row]) -> str:
    """For each GPU other families of models beside PEFT; empty without such a run."""
    mine = [run for run in runs if run["kind"] == "families"]
    return "\n\n".join(_families_on(gpu, mine) for gpu in sorted({str(run.get("gpu")) for run in mine}))


def _families_on(gpu: str, runs: Sequence[Row]) -> str:
    here = [run for run in runs if str(run.get("gpu")) == gpu]
    found = {row["item"]: (run, row) for run in here for row in run["rows"]}
    header = ("a step of", "tokens", "PEFT", "ours, not compiled", "ours", "ratio to PEFT", "captured")
    rows = [
        [
            f"{row['family']} ({row['blocks']} blocks, width {row['width']:,})",
            f"{row['tokens']:,}",
            f"{row['peft_ms']:,.1f} ms" if "peft_ms" in row else NOT_RUN,
            f"{row['plain_ms']:,.1f} ms",
            f"{row['ms']:,.1f} ms",
            f"{row['peft_ms'] / row['ms']:.2f} × as fast" if "peft_ms" in row else "–",
            row["captured"],
        ]
        for _, row in found.values()
    ]
    origins: dict[tuple[str, ...], list[str]] = {}
    for item, (run, _) in found.items():
        origins.setdefault(_origin(run), []).append(item)
    failed = {name for run in here for name in run.get("failures", {})} - {row["family"] for _, row in found.values()}
    more = [f"No number yet: {', '.join(sorted(failed))}."] if failed else []
    parts = [f"Other families on an {gpu}:", markdown(header, rows), "\n".join([*_origins("Families", origins), *more])]
    return "\n\n".join(parts)


def further(runs: Sequence[Row]) -> str:
    """What the targets aren't about: other GPUs, other families."""
    return "\n\n".join(part for part in (elsewhere(runs), family_table(runs)) if part)


def page(runs: Sequence[Row]) -> str:
    """All tables that the runs have rows for."""
    return "\n\n".join(part for part in (table(runs), further(runs), kernel_table(runs)) if part)


def recorded(make: Callable[[Sequence[Row]], str], results: Sequence[Path] = RESULTS) -> str:
    """What stands between a page's markers: `make` of the results files, or that there are none."""
    found = [path for path in results if path.exists()]
    return make(load_runs(found)) if found else NOTHING


def put_between(text: str, block: str) -> str:
    """The page with `block` between its markers. Exits when they are missing."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        sys.exit(f"the page needs one line {START} and after it one line {END}")
    return f"{text[: text.index(START)]}{START}\n{block}\n{text[text.index(END) :]}"


PAGES: Mapping[Path, Callable[[Sequence[Row]], str]] = {README: table, FURTHER: further}
"""Generated pages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, save or write into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what gpu_training.py, gpu_peers.py and gpu_kernels.py wrote")
    parser.add_argument("--save", type=Path, help="keep the runs in one file")
    parser.add_argument("--readme", action="store_true", help="write the tables of the recorded runs into the README files")
    args = parser.parse_args(arguments)
    if not args.files and not args.readme:
        parser.error("give result files, or --readme")
    if args.files:
        runs = load_runs(args.files)
        print(page(runs))
        if args.save:
            save_runs(args.save, runs)
    if args.readme:
        for path, make in PAGES.items():
            path.write_text(put_between(path.read_text(encoding="utf-8"), recorded(make)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
