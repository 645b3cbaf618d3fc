"""What is said of held-out rows that are too few to go by, or lack a label."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.training.events import Notice
from lorabank.training.jobs import AdapterJob

FEW = 10
"""Rows below which a score says little: one of them is worth more than a tenth."""
SHOWN = 5

NONE = "no validation rows: the last step is kept, since the best can't be known. data.val_split holds rows out."


def held_out_notice(name: str, job: AdapterJob, missing: Sequence[str]) -> Notice | None:
    """What a user should know of an adapter's held-out rows. `missing`: labels that none of them has."""
    if not job.val:
        return Notice(text=NONE, adapter=name, level="warning")
    said = []
    if len(job.val) < FEW:
        rows = "row is" if len(job.val) == 1 else "rows are"
        said.append(f"only {len(job.val)} {rows} held out, too few to choose the best step by, or to go by the scores")
    if missing:
        more = f", … ({len(missing)} in all)" if len(missing) > SHOWN else ""
        said.append(f"no held-out row has the label {', '.join(missing[:SHOWN])}{more}")
    if not said:
        return None
    way_out = "data.val_split takes a larger share or a number of rows, data.val rows of their own."
    return Notice(text=f"{'; '.join(said)}. {way_out}", adapter=name)
