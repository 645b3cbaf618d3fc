"""Mixtures of experts beside PEFT as a table, of runs that gpu_experts.py wrote. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_cells import markdown
from gpu_checked import refuse_unchecked
from gpu_notes import origins

Row = Mapping[str, Any]
_HEADER = ("a step of", "PEFT", "ours, plain torch", "ours", "ratio to PEFT", "PEFT's peak", "our peak", "captured")


def expert_table(runs: Sequence[Row]) -> str:
    """For each GPU the latest of each item; empty without such a run. Exits on a row whose check isn't recorded as passed."""
    mine = [run for run in runs if run["kind"] == "experts"]
    for run in mine:
        refuse_unchecked(run)
    return "\n\n".join(_on(gpu, mine) for gpu in sorted({str(run.get("gpu")) for run in mine}))


def _on(gpu: str, runs: Sequence[Row]) -> str:
    found = {row["item"]: (run, row) for run in runs if str(run.get("gpu")) == gpu for row in run["rows"]}
    rows = []
    for _, row in found.values():
        steps, peft = row["peft_steps"], row["peft_ms"] * row["peft_steps"]
        several = f", {steps} adapters" if steps > 1 else ""
        rows.append(
            [
                f"{row['family']} ({row['blocks']} blocks), {row['tokens']:,} tokens{several}",
                f"{peft:,.1f} ms" + (f" ({steps} steps)" if steps > 1 else ""),
                f"{row['plain_ms']:,.1f} ms",
                f"{row['ms']:,.1f} ms",
                f"{peft / row['ms']:.2f} × as fast",
                f"{row['peft_peak_gib']:.1f} GiB",
                f"{row['peak_gib']:.1f} GiB",
                "yes" if row["captured"] else "no",
            ]
        )
    title = f"Mixtures of experts on an {gpu}, rank 16 on all linear layers, experts included:"
    return "\n\n".join([title, markdown(_HEADER, rows), "\n".join(origins("Mixtures", list(found.items())))])
