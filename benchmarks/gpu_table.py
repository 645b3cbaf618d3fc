"""The GPU results as a table: work, best peer, ours, ratio, target, met or not. Needs no torch.

    python benchmarks/gpu_table.py ours.json peers.json kernels.json                       # Markdown on standard output
    python benchmarks/gpu_table.py ours.json peers.json --save benchmarks/results/gpu-h100.json   # the runs in one file
    python benchmarks/gpu_table.py --readme           # between the markers in README.md and of four pages in benchmarks/

Of an item that was run twice the later one counts, but one beside which a peer ran on the same card before one without; of one
whose target is a time, or a rate of a copy, on the targets' GPU one before any other; of a peer's that of our own run's session,
else the fastest. A run of ours whose check, or a row whose storage's or family's check, isn't recorded as passed is refused; a
ratio to a peer that ran on another GPU isn't printed, one to a peer of another session says so; a model cut to fewer blocks gets
no verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cells import NOT_RUN, cells, markdown
from gpu_checked import refuse_unchecked
from gpu_expert_table import expert_table
from gpu_kernel_pages import kernel_cells, kernel_page, kernel_table
from gpu_lines import KERNELS, LINES, TARGET_GPU
from gpu_measured import Measured, on_target
from gpu_notes import notes, origins
from gpu_results import load_runs, save_runs
from gpu_tests import tests_page

Row = Mapping[str, Any]

HERE = Path(__file__).parent
RESULTS = tuple(HERE / "results" / f"gpu-{card}.json" for card in ("h100", "h200"))
START, END = "<!-- gpu-table:start -->", "<!-- gpu-table:end -->"
NOTHING = "Nothing is recorded yet."


def table(runs: Sequence[Row]) -> str:
    """The comparison and its notes."""
    measured = Measured.of(runs)
    header = ("work", "best peer", "ours", "ratio", "target", "met?")
    rows = [*(cells(line, measured) for line in LINES), kernel_cells(measured)]
    return markdown(header, rows) + "\n\n" + "\n".join(notes(measured))


def elsewhere(runs: Sequence[Row]) -> str:
    """For each other GPU a table of ours beside its peers there, without a verdict; empty where there is none."""
    known = sorted({str(run.get("gpu")) for run in runs if run.get("gpu") and not on_target(run)})
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
    for run in mine:
        refuse_unchecked(run)
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
    failed = {name for run in here for name in run.get("failures", {})} - {row["family"] for _, row in found.values()}
    more = [f"No number yet: {', '.join(sorted(failed))}."] if failed else []
    below = "\n".join([*origins("Families", list(found.items())), *more])
    return "\n\n".join([f"Other families on an {gpu}:", markdown(header, rows), below])


def further(runs: Sequence[Row]) -> str:
    """What the targets aren't about: other GPUs, other families, mixtures of experts."""
    return "\n\n".join(part for part in (elsewhere(runs), family_table(runs), expert_table(runs)) if part)


def page(runs: Sequence[Row]) -> str:
    """All tables that the runs have rows for."""
    return "\n\n".join(part for part in (table(runs), further(runs), kernel_table(runs)) if part)


@dataclass(frozen=True)
class Page:
    """What stands between a page's markers."""

    make: Callable[[Sequence[Row]], str]
    results: Sequence[Path] = RESULTS
    """Files whose runs it is made of; those that aren't there yet are left out."""

    def block(self) -> str:
        """The generated text, or that there is nothing to show."""
        return recorded(self.make, self.results)


def short(rows: Sequence[Row]) -> str:
    """The table of targets without the notes below it."""
    return (
        table(rows).split("\n\n")[0]
        + "\n\nMachines, versions, commits and notes to these rows: [benchmarks/gpu.md](benchmarks/gpu.md)."
    )


PAGES: Mapping[Path, Page] = {
    HERE.parent / "README.md": Page(short),
    HERE / "gpu.md": Page(table),
    HERE / "README.md": Page(further),
    HERE / "kernels.md": Page(kernel_page),
    HERE / "gpu-tests.md": Page(tests_page, sorted((HERE / "results").glob("gpu-tests-*.json"))),
}
"""Generated pages: the targets (short, and with their notes), other GPUs and families, kernels, tests on a GPU."""


def recorded(make: Callable[[Sequence[Row]], str], results: Sequence[Path] = RESULTS) -> str:
    """`make` of the results files, or that there are none."""
    found = [path for path in results if path.exists()]
    return make(load_runs(found)) if found else NOTHING


def put_between(text: str, block: str) -> str:
    """The page with `block` between its markers. Exits when they are missing."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        sys.exit(f"the page needs one line {START} and after it one line {END}")
    return f"{text[: text.index(START)]}{START}\n{block}\n{text[text.index(END) :]}"


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
        for path, generated in PAGES.items():
            path.write_text(put_between(path.read_text(encoding="utf-8"), generated.block()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
