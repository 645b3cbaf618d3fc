"""What the GPU tables must be read with: where numbers are from, what else was measured, what a check lacked. Needs no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_cells import anchored, memory_notes, ratio_to_peer
from gpu_checked import FORMS, unchecked_forms
from gpu_lines import LINES, Line
from gpu_measured import Found, Measured

Row = Mapping[str, Any]

WIDTH = 140
"""Characters of a line of text."""
MUCH = 1.1
"""Times the shortest of several runs, from which on it is said how far they are apart."""


def notes(measured: Measured) -> Iterator[str]:
    """Those of a table, a line or more each."""
    yield from origins("Ours", [*measured.ours.items(), *(("kernels", pair) for pair in measured.kernels)])
    best = ((line.item, measured.best_peer(line)) for line in LINES)
    yield from origins("Peers", [(item, found) for item, found in best if found is not None])
    for line in LINES:
        yield from _anchor_note(line, measured)
        yield from _spread_note(line, measured)
    yield from _later_notes(measured)
    yield from _form_note(measured)
    yield from map(filled, memory_notes(LINES, measured))
    if "nf4-2x2048-recompute" in measured.ours:
        yield "NF4: memory was capped on that GPU; no 24 GB card was run."
        if not measured.ours["nf4-2x2048-recompute"][1].get("offload"):
            yield "In that run of NF4 ours kept what is computed again from on the GPU; Unsloth's keeps it on the host."


def filled(text: str) -> str:
    """The text in lines of WIDTH."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def origins(whose: str, found: Sequence[tuple[str, Found]]) -> Iterator[str]:
    """Where the numbers of some items are from, a line for each origin; which items of it, if there are several."""
    named: dict[tuple[str, ...], dict[str, None]] = {}
    for item, (run, row) in found:
        named.setdefault(_origin(run, row), {})[item] = None
    for (gpu, version, code, date), items in sorted(named.items()):
        which = f" ({', '.join(items)})" if len(named) > 1 else ""
        yield filled(f"{whose}: {gpu}, torch {version}, commit {code}, {date}{which}.")


def _origin(run: Row, row: Row) -> tuple[str, ...]:
    versions = run.get("versions", {})
    flash = f", flash-attn-4 {versions['flash-attn-4']}" if "flash-attn-4" in versions else ""
    gpu = run.get("gpu") or row.get("gpu")
    return str(gpu), f"{versions.get('torch', '?')}{flash}", str(run.get("commit")), str(run.get("date"))


def _anchor_note(line: Line, measured: Measured) -> Iterator[str]:
    """That a target which the issue gives as a ratio too is judged by its time, and what the ratio is to the peer as it ran."""
    best = measured.best_peer(line)
    if line.anchor_ms is None or best is None or line.item not in measured.ours:
        return
    peer = best[1]
    ratio = ratio_to_peer(line, *measured.ours[line.item], peer)
    if ratio is not None:
        yield filled(
            f"{line.item}: judged by its time. {anchored(line):.1f} × was that time's ratio to {line.peer_repeats} × "
            f"{line.anchor_ms:g} ms of the peer when the target was set; against the peer as it ran here, {line.peer_repeats} × "
            f"{peer['ms']:,.1f} ms, ours is {ratio:.2f} × as fast."
        )


def _spread_note(line: Line, measured: Measured) -> Iterator[str]:
    """How far runs of the shown peer's are apart, and ours, each on GPUs of the shown kind, where that is much: hosts differ."""
    best = measured.best_peer(line)
    if best is None or line.item not in measured.ours:
        return
    gpu, name = best[1].get("gpu"), best[1]["name"]
    peer = name.partition(":")[0]
    theirs = sorted(
        row["ms"]
        for _, row in measured.peers[line.peer_item or ""]
        if (row.get("gpu"), row["name"], "ms" in row) == (gpu, name, True)
    )
    if len(theirs) < 2 or theirs[-1] < MUCH * theirs[0]:
        return
    mine = sorted(row["ms"] for run, row in measured.all_ours.get(line.item, ()) if run.get("gpu") == gpu)
    ours = f"; ours {_range(mine)}" if mine else ""
    yield filled(f"{line.item}: on machines with such a GPU a step of {peer} took {_range(theirs)}{ours}.")


def _range(times: Sequence[float]) -> str:
    if len(times) == 1:
        return f"{times[0]:,.1f} ms"
    return f"{times[0]:,.1f} to {times[-1]:,.1f} ms in {len(times)} runs"


def _later_notes(measured: Measured) -> Iterator[str]:
    """What our latest run of an item gave, where the table has an earlier one, since a peer ran beside that."""
    for item, (run, row) in measured.later.items():
        if item in measured.ours:
            took = f" · {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
            when = f"commit {run.get('commit')}, {run.get('date')}"
            yield f"{item}: {row['ms']:,.1f} ms{took} in a later run without a peer, {when}."


def _form_note(measured: Measured) -> Iterator[str]:
    """Which numbers are of runs whose check is older than the check of the form that was timed."""
    missing: dict[str, list[str]] = {}
    for item, (run, row) in measured.ours.items():
        for form in unchecked_forms(run, row):
            missing.setdefault(form, []).append(item)
    if missing:
        each = "; ".join(f"{FORMS[form]} ({', '.join(missing[form])})" for form in FORMS if form in missing)
        yield filled(f"Checked, but not in the form that was timed, in runs older than the check of it: {each}.")
