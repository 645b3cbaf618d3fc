"""Runs of the GPU benchmarks to make tables of, and how a line of a table is read."""

from __future__ import annotations

from typing import Any

GPU = "NVIDIA H100 80GB HBM3"
HEAD = {"date": "2026-01-01", "commit": "abc", "gpu": GPU, "versions": {"torch": "2.11.0"}}
CHECKED = {name: {"passed": True} for name in ("peft", "recompute", "offload", "joint", "mixed", "nf4")} | {
    "passed": True,
    "fp8": {"passed": True, "twin_worst_distance": 0.1},
}


def step(item: str, ms: float, tokens: int = 4096, peak: float = 27.0) -> dict[str, Any]:
    return {"item": item, "layers": 32, "ms": ms, "tokens_per_s": round(tokens / ms * 1e3), "peak_gib": peak}


def ours(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "training", **HEAD, "check": CHECKED, "rows": list(rows), **more}


def peers(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = [{"name": f"{row['impl']}:{row['item']}", "gpu": GPU, **row} for row in rows]
    return {"kind": "peers", **HEAD, "rows": named, **more}


def families(**ms: tuple[float | None, float]) -> dict[str, Any]:
    """PEFT's time and ours by family."""
    rows = [
        {"item": f"family-{name}-512", "family": name, "tokens": 512, "blocks": 4, "width": 1024, "plain_ms": 30.0, "ms": mine}
        | {"captured": "yes"}
        | ({} if theirs is None else {"peft_ms": theirs})
        for name, (theirs, mine) in ms.items()
    ]
    found = {"loss": 0.1, "rounding": 0.2, "all gradients": 0.5}
    check = {f"{name}-512": {"ours": found} | ({} if theirs is None else {"peft": found}) for name, (theirs, _) in ms.items()}
    return {"kind": "families", **HEAD, "check": check, "rows": rows}


def elsewhere(run: dict[str, Any]) -> dict[str, Any]:
    """The same on another GPU."""
    return {**run, "gpu": "NVIDIA H200", "rows": [{**row, "gpu": "NVIDIA H200"} for row in run["rows"]]}


def line_of(text: str, work: str) -> list[str]:
    found = next(line for line in text.splitlines() if line.startswith(f"| {work}"))
    return [cell.strip() for cell in found.split("|")[1:-1]]
