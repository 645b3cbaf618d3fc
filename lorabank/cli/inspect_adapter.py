"""One adapter as `lorabank inspect` shows it: for people in 80 columns, and for machines as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.formats.measure import HUGE, RULE, Findings, LayerMeasure, findings, measures
from lorabank.formats.readers import READERS, non_finite
from lorabank.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from lorabank.formats.adapter import Adapter

BARS = "▁▂▃▄▅▆▇█"
BAR_COLUMNS = 8
SHOWN = 4
"""Layers named in a line; `--layers` shows all."""


def form_of(path: Path) -> str:
    """What kind of file or folder the adapter came in."""
    from lorabank.formats.detect import FORMATS
    from lorabank.formats.files import read_header

    if path.is_dir() and (path / "adapter_config.json").is_file():
        return "PEFT folder with lorabank.json" if (path / "lorabank.json").is_file() else "PEFT folder"
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    header = read_header(file)
    return next((f"{form.title} file" for form in FORMATS.values() if form.recognise(header)), "safetensors file")


def as_json(adapter: Adapter, path: Path) -> dict[str, Any]:
    """All that `inspect` knows, as JSON values; numbers that aren't finite are null."""
    from lorabank.formats.peft_config import config_to_dict

    found = measures(adapter)
    stands_out = findings(found)
    return {
        "adapter": str(path),
        "form": form_of(path),
        "config": config_to_dict(adapter.config),
        "base": {"name": adapter.base_model, "fingerprint": fingerprint_digest(adapter), "task_type": adapter.task_type},
        "parameters": adapter.num_parameters,
        "dtypes": dtypes(adapter),
        "modules": {path: _count(module) for path, module in adapter.modules.items()},
        "layers": [{**_finite(vars(layer)), "gain": _number(layer.gain)} for layer in found],
        "broken": list(dict.fromkeys([*stands_out.broken, *non_finite(adapter)])),
        "zero": list(stands_out.zero),
        "huge": [layer.path for layer in stands_out.huge],
        "outliers": dict(stands_out.outliers),
        "readers": {
            name: [
                {"what": item.what, "way_out": item.way_out, "layers": list(item.layers)} for item in reader.obstacles(adapter)
            ]
            for name, reader in READERS.items()
        },
    }


def _count(module: Mapping[str, Tensor]) -> int:
    """Parameters of a module that was trained in full, and numbers in its buffers."""
    return sum(value.numel() for value in module.values() if value.is_floating_point())


def broken_beside(adapter: Adapter) -> list[str]:
    """What holds NaN or infinity beside the layers, in words."""
    broken = non_finite(adapter)
    modules = [f"module {path}, which was trained in full" for path in adapter.modules if path in broken]
    return [*(name for name in adapter.extras if name in broken), *modules]


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in values.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def fingerprint_digest(adapter: Adapter) -> str | None:
    """Twelve hex digits that are equal for adapters with one and the same fingerprint; None without one."""
    if adapter.fingerprint is None:
        return None
    text = json.dumps(adapter.fingerprint.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dtypes(adapter: Adapter) -> list[str]:
    """Names of the matrices' dtypes."""
    return sorted(
        {str(value.dtype).removeprefix("torch.") for layer in adapter.layers.values() for value in layer.tensors.values()}
    )


def print_adapter(console: Console, adapter: Adapter, path: Path, *, layers: bool = False) -> bool:
    """Print one adapter; returns whether every number is finite."""
    found = measures(adapter)
    stands_out = findings(found)
    console.print(f"\n[bold]adapter {path}[/]")
    console.print(_facts(adapter, path))
    console.print(_layer_table(found) if layers else _kind_table(found))
    _print_findings(console, found, stands_out)
    for name in broken_beside(adapter):
        console.print(f"[red]NaN or infinity in {name}[/]")
    console.print(_readers(adapter))
    return not non_finite(adapter)


def _facts(adapter: Adapter, path: Path) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from lorabank.training import human

    config = adapter.config
    tensors = [value for layer in adapter.layers.values() for value in layer.tensors.values()]
    modules = (value for module in adapter.modules.values() for value in module.values())
    size = sum(value.nbytes for value in (*tensors, *adapter.extras.values(), *modules))
    kind = ("rsLoRA, α/√r" if config.use_rslora else "LoRA, α/r") + (", DoRA" if config.use_dora else "")
    patterns = " (patterns differ)" if config.rank_pattern or config.alpha_pattern else ""
    scalings = sorted({layer.scaling for layer in adapter.layers.values()})
    scaling = f"{scalings[0]:.3g}" if len(scalings) == 1 else f"{scalings[0]:.3g} to {scalings[-1]:.3g}"
    ranks = Counter(layer.rank for layer in adapter.layers.values())
    digest = fingerprint_digest(adapter)
    sampled = (
        f"fingerprint {digest}, of {counted(len(adapter.fingerprint.tensors), 'tensor')}"
        if adapter.fingerprint
        else "no fingerprint"
    )
    rows = {
        "form": f"{form_of(path)}, {' and '.join(dtypes(adapter))}, {human.size(size)}",
        "kind": f"{kind}, rank {config.rank}, alpha {config.alpha:g}{patterns}, scaling {scaling}, dropout {config.dropout:g}",
        "base": f"{escape(adapter.base_model or 'not named')}; {sampled}",
        "layers": f"{counted(len(adapter.layers), 'layer')}, {counted(adapter.num_parameters, 'parameter')}",
    }
    if adapter.modules:
        rows["in full"] = ", ".join(f"{escape(name)} ({_count(module):,})" for name, module in adapter.modules.items())
    if also := _extras(adapter):
        rows["also trained"] = escape(also)
    if len(ranks) > 1:
        rows["ranks"] = ", ".join(f"{rank} in {number}" for rank, number in sorted(ranks.items()))
    if any(layer.frozen_rank for layer in adapter.layers.values()):
        rows["start"] = (
            f"a difference ({config.init}): files hold twice the rank, the last half where it started, which doesn't train"
        )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _extras(adapter: Adapter) -> str:
    """What is trained beside A and B; empty for nothing."""
    low = sum(layer.lora_bias is not None for layer in adapter.layers.values())
    found = [f"{low} biases of lora_B"] if low else []
    found += [counted(len(adapter.biases), "bias", "biases")] if adapter.biases else []
    return ", ".join([*found, *(f"{len(own.ids)} token rows of {path}" for path, own in adapter.token_rows.items())])


def _kind_table(found: Sequence[LayerMeasure]) -> Table:
    from lorabank.training import human
    from lorabank.training.tables import new_table

    table = new_table()
    table.add_column("module", style="cyan", overflow="fold")
    for head in ("n", "in→out", "rank", "params", "‖ΔW‖", "‖ΔW‖₂", "eff.r"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("by block", no_wrap=True)
    top = max((layer.norm for layer in found if layer.finite), default=0.0)
    for kind in dict.fromkeys(layer.kind for layer in found):
        layers = [layer for layer in found if layer.kind == kind]
        table.add_row(
            kind,
            str(len(layers)),
            _span(f"{layer.fan_in}→{layer.fan_out}" for layer in layers),
            _numbers([layer.rank for layer in layers]),
            human.count(sum(layer.parameters for layer in layers)),
            f"{_mean_square([layer.norm for layer in layers]):.3g}",
            f"{max((layer.spectral for layer in layers if layer.finite), default=math.nan):.3g}",
            f"{sum(layer.effective_rank for layer in layers) / len(layers):.1f}",
            bars([layer.norm for layer in layers], top),
        )
    return table


def _layer_table(found: Sequence[LayerMeasure]) -> Table:
    from lorabank.training.tables import new_table

    table = new_table()
    table.add_column("layer", style="cyan", overflow="fold")
    for head in ("in→out", "rank", "‖ΔW‖", "‖ΔW‖₂", "eff.r"):
        table.add_column(head, justify="right", no_wrap=True)
    for layer in found:
        numbers = (f"{layer.norm:.3g}", f"{layer.spectral:.3g}", f"{layer.effective_rank:.1f}")
        table.add_row(layer.path, f"{layer.fan_in}→{layer.fan_out}", str(layer.rank), *numbers)
    return table


def bars(values: Sequence[float], top: float) -> str:
    """Values in their order as at most eight bars, `top` being the highest; x where one isn't finite."""
    count = min(len(values), BAR_COLUMNS)
    groups = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    shown = ""
    for group in groups:
        height = _mean_square(group) / top if top else 0.0
        shown += BARS[min(int(height * len(BARS)), len(BARS) - 1)] if math.isfinite(height) else "x"
    return shown


def _mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _print_findings(console: Console, found: Sequence[LayerMeasure], stands_out: Findings) -> None:
    console.print("‖ΔW‖: root mean square over the layers; ‖ΔW‖₂: the largest singular value;", style="dim")
    console.print("eff.r: directions in use, exp of the entropy of the singular values (mean)", style="dim")
    order = sorted((layer for layer in found if layer.norm > 0), key=lambda layer: layer.norm)
    if len(order) > 1:
        console.print(f"largest   {order[-1].path}: ‖ΔW‖ {order[-1].norm:.3g}", markup=False)
        console.print(f"smallest  {order[0].path}: ‖ΔW‖ {order[0].norm:.3g}", markup=False)
    if stands_out.outliers:
        named = [f"{path} ({factor:.2g} × the median)" for path, factor in stands_out.outliers.items()]
        console.print(f"{counted(len(named), 'layer')} out of line with their kind: {_few(named)}", style="yellow", markup=False)
        console.print(f"  rule: {RULE}", style="dim")
    if stands_out.huge:
        named = [f"{layer.path} ({layer.gain:.3g} ×)" for layer in stands_out.huge]
        where = f"{counted(len(named), 'layer')}: {_few(named)}"
        text = f"huge: the change alone makes outputs over {HUGE:g} times their inputs in {where}"
        console.print(f"{text}. Has the training diverged?", style="bold red", markup=False)
    if stands_out.zero:
        change = f"{counted(len(stands_out.zero), 'layer')} with A or B = 0, without a change: {_few(stands_out.zero)}"
        console.print(change, style="yellow", markup=False)
    if stands_out.broken:
        broken = f"NaN or infinity in {counted(len(stands_out.broken), 'layer')}: {_few(stands_out.broken)}"
        console.print(broken, style="bold red", markup=False)
    else:
        console.print("no NaN, no infinity", style="green")


def _readers(adapter: Adapter) -> Table:
    from rich.markup import escape

    from lorabank.training.tables import new_table

    table = new_table()
    table.add_column("who reads it", style="cyan", no_wrap=True)
    table.add_column("", overflow="fold")
    for reader in READERS.values():
        found = reader.obstacles(adapter)
        table.add_row(reader.title, "[green]yes[/]" if not found else "[yellow]no[/]: " + escape("; ".join(map(str, found))))
    return table


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _span(values: Iterable[object]) -> str:
    found = list(dict.fromkeys(map(str, values)))
    return found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}"


def _numbers(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"
