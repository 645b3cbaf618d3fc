"""All rows of the result files: which of our runs a line of the table shows, and beside which peer. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_checked import refuse_unchecked
from gpu_lines import ANYWHERE, PEER_ITEMS, TARGET_GPU, Line
from gpu_results import same_card, same_session

Row = Mapping[str, Any]
Found = tuple[Row, Row]
"""(run, row)."""


@dataclass(frozen=True)
class Measured:
    """Everything that the files hold."""

    ours: Mapping[str, Found]
    """Item to what is shown of it."""
    later: Mapping[str, Found]
    """Item to our latest, where `ours` has an earlier one, whose peer ran beside it."""
    peers: Mapping[str, Sequence[Found]]
    """Item to every peer's, older ones first."""
    kernels: Sequence[Found]
    all_ours: Mapping[str, Sequence[Found]]
    """Item to every run of it."""

    @classmethod
    def of(cls, runs: Sequence[Row]) -> Measured:
        """Sort the rows of all runs. Exits for a run of ours whose check isn't recorded as passed."""
        ours: dict[str, list[Found]] = {}
        peers: dict[str, list[Found]] = {}
        kernels: dict[tuple[object, ...], Found] = {}
        for run in runs:
            refuse_unchecked(run)
            for row in run["rows"]:
                if run["kind"] == "training":
                    ours.setdefault(row["item"], []).append((run, row))
                elif run["kind"] == "peers":
                    peers.setdefault(row["item"], []).append((run, row))
                elif run["kind"] == "kernels":
                    key = tuple(row.get(key) for key in ("kernel", "shape", "rank"))
                    if key not in kernels or on_target(run) or not on_target(kernels[key][0]):
                        kernels[key] = (run, row)
        there = [pair for pair in kernels.values() if on_target(pair[0])]  # of kernels that were never there none counts beside
        shown, later = {}, {}
        for item, found in ours.items():
            near = found if item in ANYWHERE else [pair for pair in found if on_target(pair[0])] or found
            shown[item] = _shown(near, peers.get(PEER_ITEMS.get(item, ""), ()))
            if shown[item] is not near[-1]:
                later[item] = near[-1]
        return cls(shown, later, peers, there or list(kernels.values()), ours)

    def best_peer(self, line: Line) -> Found | None:
        """(run, row) of the fastest peer of a line's work; None where none was run.

        On the GPU of our own run if any ran there; of a peer that was run twice the row of our run's session, else the fastest.
        """
        found = [(run, row) for run, row in self.peers.get(line.peer_item or "", ()) if row.get("ms")]
        mine = self.ours[line.item][0] if line.item in self.ours else {}
        there = [pair for pair in found if pair[1].get("gpu") == mine.get("gpu")] or found
        named: dict[tuple[str, str], Found] = {}
        for pair in sorted(there, key=lambda pair: (same_session(mine, pair[0]), -pair[1]["ms"])):
            named[pair[1]["name"], str(pair[1].get("gpu"))] = pair
        return min(named.values(), key=lambda pair: pair[1]["ms"], default=None)


def on_target(run: Row) -> bool:
    """Whether a run was on the GPU that the targets are for."""
    return TARGET_GPU in str(run.get("gpu"))


def _shown(found: Sequence[Found], peers: Sequence[Found]) -> Found:
    """Our latest beside which a peer ran on the same card, else our latest. Same commits alone displace no later number."""
    beside = [pair for pair in found if any(same_card(pair[0], run) and row.get("ms") for run, row in peers)]
    return (beside or found)[-1]
