"""Numbers as people read them: 1.2 k, 3m 20s, 4.3e-4, 1.9 GB."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """`1234567` as `1.23 M`; below 10,000 as it is."""
    if not math.isfinite(value):
        return "–"
    if abs(value) < 999.5:
        return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.1f}"
    for power, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * 0.9995:
            return f"{value / power:.3g} {suffix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m 20s`, `2h 05m`, `3d 4h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if 0 < seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def rate(value: float) -> str:
    """A learning rate: three digits, `4.3e-04` as `4.3e-4`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(num_bytes: float) -> str:
    """Bytes as `812 MB`, `1.9 GB` (powers of 1024)."""
    for power, suffix in ((2**40, "TB"), (2**30, "GB"), (2**20, "MB")):
        if num_bytes >= power:
            return f"{num_bytes / power:.1f} {suffix}" if num_bytes < 100 * power else f"{num_bytes / power:.0f} {suffix}"
    return f"{num_bytes / 1024:.0f} kB"


def share(part: float, whole: float) -> str:
    """A share in per cent with two significant digits."""
    return f"{100 * part / whole:.2g} %" if whole else "–"


def score(name: str, value: float) -> str:
    """A metric's value: losses with three decimals, scores out of a hundred with one."""
    if not math.isfinite(value):
        return str(value)
    if name == "loss":
        return f"{value:.3f}"
    if name in ("bleu", "chrf"):
        return f"{value:.1f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
