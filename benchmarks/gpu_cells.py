"""The cells of the GPU table: work, peer, ours, ratio, target, and whether it is met or by how much it isn't. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from gpu_checked import QUANTIZED
from gpu_lines import LAYERS, TARGET_GPU, Bound, Line
from gpu_measured import Measured, on_target
from gpu_results import same_session

Row = Mapping[str, Any]

NOT_RUN = "not run"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_to_peer(line: Line, run: Row, row: Row, peer: Row | None) -> float | None:
    """The peer's time for the work over ours; None without a peer, on another GPU or of another model."""
    if peer is None or run.get("gpu") != peer.get("gpu") or row.get("layers") != peer.get("layers"):
        return None
    return line.peer_repeats * peer["ms"] / row["ms"]


def first_step_spans_loading(row: Row) -> bool:
    """Whether the peak of a first step is also that of making the model in bf16 and quantising it, as in older runs."""
    return row.get("storage") in QUANTIZED and "load_peak_gib" not in row and "first_step_peak_gib" in row


def with_memory(row: Row) -> Row:
    """The row, its `peak_gib` that of all steps: the first one's too, where that is known without loading."""
    if "peak_gib" not in row or first_step_spans_loading(row):
        return row
    return {**row, "peak_gib": max(row["peak_gib"], row.get("first_step_peak_gib", 0.0))}


def cells(line: Line, measured: Measured) -> list[str]:
    """A line of the table."""
    peer_run, peer = measured.best_peer(line) or ({}, None)
    target = "; ".join(map(str, line.bounds)) or ("faster, no more memory" if line.beat_peer else "–")
    if line.anchor_ms is not None:
        target += f" ({anchored(line):.1f} × the anchor's {line.peer_repeats} × {line.anchor_ms:g} ms)"
    if line.item not in measured.ours:
        return [line.work.replace(" ({layers} blocks)", ""), _peer_cell(line, peer), NOT_RUN, "–", target, "–"]
    run, row = measured.ours[line.item]
    row = with_memory(row)
    beside = line.beside.format_map(row) if line.beside else _peer_cell(line, peer)
    work = line.work.format_map(row) + ("" if on_target(run) or not line.anywhere else f" (on an {run.get('gpu')})")
    ratio = _ratio_cell(line, run, row, peer)
    if ratio_to_peer(line, run, row, peer) is not None and not same_session(run, peer_run):
        ratio += " (peer of another run)"
    return [work, beside, line.ours.format_map(row), ratio, target, verdict(line, run, row, peer)]


def anchored(line: Line) -> float:
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
    """Whether the target is met, and else by how much it is missed and what is in the way."""
    if not line.bounds and not line.beat_peer:
        return "–"
    if not line.anywhere and not on_target(run):
        return f"not judged: the target is for an {TARGET_GPU}"
    if row.get("layers") != LAYERS and not line.cut:
        return f"not judged: {row.get('layers')} of {LAYERS} blocks"
    if line.beat_peer:
        return _beats(line, run, row, peer)
    missed = [_missed(bound, row[bound.key]) for bound in line.bounds if not bound.reached(row[bound.key], bound.needed)]
    if missed:
        return f"no: {', '.join(missed)}{_in_the_way(line, row)}"
    short = [_short(bound, row[bound.key]) for bound in line.bounds if not bound.reached(row[bound.key], bound.goal)]
    return f"done, {', '.join(short)}{_in_the_way(line, row)}" if short else "yes"


def _missed(bound: Bound, value: float) -> str:
    over = value / bound.needed - 1
    return f"{bound.text.format(value)}, {abs(over):.0%} {'above' if over > 0 else 'below'} {bound.text.format(bound.needed)}"


def _short(bound: Bound, value: float) -> str:
    way = "above" if bound.at_most else "short of"
    return f"{abs(value / bound.goal - 1):.1%} {way} the goal of {bound.text.format(bound.goal)}"


def _in_the_way(line: Line, row: Row) -> str:
    """What LOG.md says keeps a line from its goal, with the numbers of this row; nothing where it lacks them."""
    text = line.obstacle or ""
    named = {name for _, name, _, _ in Formatter().parse(text) if name}
    return f"; in the way: {text.format_map(row)}" if text and named <= row.keys() else ""


def _beats(line: Line, run: Row, row: Row, peer: Row | None) -> str:
    ratio = ratio_to_peer(line, run, row, peer)
    if peer is None or ratio is None:
        return "not judged: no peer to compare with"
    more = f"more memory, {row['peak_gib']:.2f} against {peer['peak_gib']:.2f} GiB"
    failed = ["slower"] * (ratio <= 1) + [more] * (row["peak_gib"] > peer["peak_gib"])
    if failed:
        return f"no: {' and '.join(failed)}{_in_the_way(line, row) if more in failed else ''}"
    if first_step_spans_loading(row):
        later = f"{row['peak_gib']:.1f} against {peer['peak_gib']:.1f} GiB from the second step on"
        return f"faster; memory not judged: {later}, {row['first_step_peak_gib']:.1f} GiB before, with the making of the model"
    return "yes"


def memory_notes(lines: Sequence[Line], measured: Measured) -> Iterator[str]:
    """Of what the memory of a row is that is compared with a peer's."""
    for line in lines:
        row = measured.ours[line.item][1] if line.item in measured.ours else {}
        if line.beat_peer and first_step_spans_loading(row):
            yield (
                f"{line.item}: its memory is that from the second step on, the peers' that from the fourth on. Until the end of "
                f"the first step our process had taken {row['first_step_peak_gib']:.1f} GiB, since that run made the model in "
                "bf16 on the GPU and quantised it there. Later runs make it on the host and count the first step too."
            )
