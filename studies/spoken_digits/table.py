"""The tables and the picture of results/result.json, written into README.md.

python studies/spoken_digits/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- table: written by table.py -->\n", "<!-- table:end -->"


def percent(value: float) -> str:
    """A rate of errors for people."""
    return f"{100 * value:.1f} %"


def held_out_table(result: dict[str, Any]) -> list[str]:
    """The speaker that nobody trained on."""
    about, part = result["about"], result["held_out"]
    whole, short, mine = result["base"]["others"], part["base"]["others"], part["adapters"]["others"]
    rows = [
        ("base, its own 30 s", whole),
        (f"base, {about['window']:g} s", short),
        (f"adapter of five others, {about['window']:g} s, step {part['best_step']['others']}", mine),
    ]
    lines = [
        f"Held out: {about['held_out']}. Words wrong on that speaker's recordings 0 to 4 of each digit:",
        "",
        "| | WER | WER, normalised | CER, normalised | loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows:
        rates = " | ".join(percent(row[key]) for key in ("wer", "wer_normalized", "cer_normalized"))
        lines.append(f"| {name} | {rates} | {row['loss']:.3f} |")
    curve = [point for point in part["curve"] if point["adapter"] == "others"]
    steps = ", ".join(f"{percent(point['wer_normalized'])} after {point['step']}" for point in curve)
    return [*lines, "", f"On the way (normalised): {steps} steps."]


def joint_table(result: dict[str, Any]) -> list[str]:
    """Three speakers, in one pass and each alone."""
    about, joint = result["about"], result["joint"]
    alone = {name: result[f"alone-{name}"] for name in about["speakers"]}
    window = f"{about['window']:g} s"
    lines = [
        "Normalised WER and loss on each speaker's own held-out recordings:",
        "",
        f"| speaker | base, 30 s | base, {window} | jointly | alone | loss jointly | loss alone | ΔW apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in alone.items():
        mine, other = joint["adapters"][name], one["adapters"][name]
        lines.append(
            f"| {name} | {percent(result['base'][name]['wer_normalized'])} | {percent(joint['base'][name]['wer_normalized'])} "
            f"| {percent(mine['wer_normalized'])} | {percent(other['wer_normalized'])} "
            f"| {mine['loss']:.4f} | {other['loss']:.4f} | {result['difference'][name]:.1e} |"
        )
    seconds = sum(one["seconds"] for one in alone.values())
    return [
        *lines,
        "",
        f"ΔW apart: ‖ΔW jointly − ΔW alone‖ / ‖ΔW alone‖ after the last step. The joint run took {joint['seconds']:.0f} s, the "
        f"three one after the other {seconds:.0f} s, evaluations included, on a machine that others used at the same time.",
    ]


def connected_table(result: dict[str, Any]) -> list[str]:
    """What single digits taught about digits in a row."""
    about, part = result["about"], result["connected"]
    names = {
        "base": "base, its own 30 s",
        "base, window": f"base, {about['window']:g} s",
        "others, window": f"adapter of five others, {about['window']:g} s",
    }
    lines = [
        f"Twenty recordings of four digits in a row, put together of {about['held_out']}'s test recordings:",
        "",
        "| | WER, normalised | CER, normalised |",
        "|---|---|---|",
    ]
    for key, label in names.items():
        lines.append(f"| {label} | {percent(part[key]['wer_normalized'])} | {percent(part[key]['cer_normalized'])} |")
    return lines


def setting_line(result: dict[str, Any]) -> str:
    """What was run on what."""
    about = result["about"]
    return (
        f"{about['date']}: {about['model']}, rank {about['rank']} on all linear layers, learning rate "
        f"{about['learning_rate']:g}, {about['per_digit']} training recordings of a digit and speaker,\nwindow "
        f"{about['window']:g} s, fp32, {about['device']} with {about['threads']} thread, torch {about['torch']}, "
        f"transformers {about['transformers']}."
    )


def with_table(text: str, result: dict[str, Any]) -> str:
    """The page with the tables of `result`."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    parts = [setting_line(result), "", *held_out_table(result), "", *joint_table(result), "", *connected_table(result), ""]
    return before + START + "\n".join(parts) + END + after


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss on each speaker's held-out recordings by step, jointly and alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = result["about"]["speakers"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for color, name in zip(("#0b6fa4", "#c1440e", "#3d7d3d"), names, strict=True):
        for run, style, label in (("joint", "-", f"{name}, jointly"), (f"alone-{name}", ":", f"{name}, alone")):
            base = result[run]["base"][name]
            points = [point for point in result[run]["curve"] if point["adapter"] == name]
            steps = [0, *(point["step"] for point in points)]
            for axis, key in zip(axes, ("loss", "wer_normalized"), strict=True):
                values = [base[key], *(point[key] for point in points)]
                axis.plot(
                    steps, values, style, color=color, label=label, linewidth=2 if style == "-" else 4, marker="o", markersize=4
                )
    axes[0].set_yscale("log")
    axes[0].set_ylabel("held-out loss, nats a token")
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_ylabel("normalised WER (log above 0.1)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Write both."""
    result = json.loads((HERE / "results" / "result.json").read_text(encoding="utf-8"))
    page = HERE / "README.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), result), encoding="utf-8")
    plot(result, HERE / "results" / "speakers.png")


if __name__ == "__main__":
    main()
