"""The kernels' line of the GPU table, and their page: every kernel and shape, GPU beside GPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_cells import NOT_RUN, markdown
from gpu_lines import KERNELS, KERNELS_OBSTACLE, TARGET_GPU
from gpu_measured import Found, Measured, on_target
from gpu_notes import filled, origins

Row = Mapping[str, Any]
Key = tuple[str, str, str]
"""Kernel, shape, rank."""


def kernel_cells(measured: Measured) -> list[str]:
    """All kernels in one line: the slowest of them beside its copy."""
    others = "frozen products" + " and attention" * any(row["kernel"].startswith("attention") for _, row in measured.kernels)
    start = [f"hot kernels beside a copy of the same bytes, {others} beside torch's", "–"]
    if not measured.kernels:
        return [*start, NOT_RUN, "–", str(KERNELS), "–"]
    run, row = min(measured.kernels, key=lambda pair: pair[1]["fraction"])
    lowest = f"lowest of {len(measured.kernels)}: {row['kernel']} {row['shape']}, r {row['rank']}"
    below = sum(not KERNELS.reached(found["fraction"], KERNELS.goal) for _, found in measured.kernels)
    judged = f"no: {below} of {len(measured.kernels)} below; in the way: {KERNELS_OBSTACLE}" if below else "yes"
    if not on_target(run):
        judged = f"not judged: the target is for an {TARGET_GPU}"
    return [*start, lowest, f"{row['fraction']:.2f} of its rate", str(KERNELS), judged]


def kernel_table(runs: Sequence[Row]) -> str:
    """Every kernel and shape, for each GPU three columns, the slowest first; empty without such a run."""
    by_gpu = _by_gpu(runs)
    moving = {gpu: _keyed([pair for pair in found if "tflops" not in pair[1]]) for gpu, found in by_gpu.items()}
    computing = {gpu: _keyed([pair for pair in found if "tflops" in pair[1]]) for gpu, found in by_gpu.items()}
    parts: list[str] = []
    if any(moving.values()):
        parts.append("Beside a copy of the bytes that a kernel can't avoid:")
        parts.append(_side_by_side(moving, _moved, ("ours", "copy", "fraction")))
    if any(computing.values()):
        best = {gpu: max((_best(row) for _, row in found.values()), default=0.0) for gpu, found in computing.items()}
        floors = ", ".join(f"{gpu} {rate:.0f} TFLOP/s" for gpu, rate in best.items() if rate)
        parts += [
            filled(
                "Beside torch's own operation of the same shape. `of best` is the share that ours reached of the best product's "
                f"rate in the same runs, any shape, ours or torch's, which is the floor by operations: {floors}."
            ),
            _side_by_side(
                computing,
                lambda gpu, row: [*_moved(gpu, row), f"{row['tflops'] / best[gpu]:.2f}"],
                ("ours", "torch's", "fraction", "of best"),
            ),
        ]
    return "\n\n".join(parts)


def kernel_page(runs: Sequence[Row]) -> str:
    """The tables, and which runs they are of."""
    found = [("kernels", pair) for pairs in _by_gpu(runs).values() for pair in pairs]
    return "\n\n".join(part for part in (kernel_table(runs), "\n".join(origins("Kernels", found))) if part)


def _by_gpu(runs: Sequence[Row]) -> dict[str, Sequence[Found]]:
    """GPU to (run, row) of every kernel, the targets' GPU first."""
    mine = [run for run in runs if run["kind"] == "kernels"]
    gpus = sorted({str(run.get("gpu")) for run in mine}, key=lambda gpu: (TARGET_GPU not in gpu, gpu))
    return {gpu: Measured.of([run for run in mine if str(run.get("gpu")) == gpu]).kernels for gpu in gpus}


def _keyed(found: Sequence[Found]) -> dict[Key, Found]:
    return {(row["kernel"], row["shape"], str(row["rank"])): (run, row) for run, row in found}


def _moved(gpu: str, row: Row) -> list[str]:
    return [f"{row['us']:.1f} µs", f"{row['beside_us']:.1f} µs", f"{row['fraction']:.2f}"]


def _best(row: Row) -> float:
    """TFLOP/s of a row's faster side; 0 for attention, whose softmax isn't counted."""
    return 0.0 if row["kernel"].startswith("attention") else row["tflops"] * max(1.0, row["us"] / row["beside_us"])


def _side_by_side(found: Mapping[str, Mapping[Key, Found]], shown: Callable[[str, Row], list[str]], header: Sequence[str]) -> str:
    """A line for each key, GPU beside GPU, ordered by the fraction on the first GPU that has it."""
    keys = {key: row["fraction"] for gpu in reversed(found) for key, (_, row) in found[gpu].items()}
    blank = ["–"] * len(header)
    rows = [
        [*key, *(cell for gpu in found for cell in (shown(gpu, found[gpu][key][1]) if key in found[gpu] else blank))]
        for key in sorted(keys, key=lambda key: (keys[key], key))
    ]
    titles = [f"{_short_name(gpu)}: {title}" for gpu in found for title in header]
    return markdown(("kernel", "shape", "rank", *titles), rows)


def _short_name(gpu: str) -> str:
    """H100 for NVIDIA H100 80GB HBM3."""
    return next((word for word in gpu.split() if word != "NVIDIA"), gpu)
