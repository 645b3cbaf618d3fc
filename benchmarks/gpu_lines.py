"""What the GPU table has lines for: the work, what is shown of it, its targets and its peer. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

TARGET_GPU = "H100"
LAYERS = 32
"""Blocks of the model that the targets are for."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A number of a row that a target asks for."""

    key: str
    goal: float
    least: float | None = None
    """What it must reach to count as done, where the goal is more than that."""
    at_most: bool = True
    text: str
    """How a value is shown, a format of one number."""

    def reached(self, value: float, bound: float) -> bool:
        """Whether `value` keeps to `bound`."""
        return value <= bound if self.at_most else value >= bound

    @property
    def needed(self) -> float:
        """What it must reach to count as done."""
        return self.goal if self.least is None else self.least

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        least = "" if self.least is None else f" (done from {self.text.format(self.least)})"
        return f"{sign} {self.text.format(self.goal)}{least}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table."""

    item: str
    work: str
    ours: str
    """What is shown of our row, a format of its numbers."""
    bounds: tuple[Bound, ...] = ()
    """Targets of issue 3, none of them a result."""
    peer_item: str | None = None
    """The peers' item that is compared with."""
    peer_repeats: int = 1
    """Steps of the peer that do our step's work."""
    anchor_ms: float | None = None
    """What a step of the peer took when the target was set, if the issue gives it as a ratio too."""
    beat_peer: bool = False
    """The target is the best peer itself: faster, with no more memory."""
    beside: str | None = None
    """Without a peer: what of our own row is compared with, a format of its numbers."""
    ratio: str | None = None
    """Then the number that is the ratio."""
    what: str = "the time"
    """What the ratio is of."""
    cut: bool = False
    """Whether fewer blocks are part of the work."""
    anywhere: bool = False
    """Whether it is judged on any GPU, beside its peer or by its memory, so that the latest run counts."""
    obstacle: str | None = None
    """What keeps it from its goal, as LOG.md has it measured; a format of its row's numbers, without which it isn't shown."""


def _faster(goal: float, least: float) -> Bound:
    return Bound(key="tokens_per_s", goal=goal, least=least, at_most=False, text="{:,.0f} tok/s")


def _within(gib: float) -> Bound:
    return Bound(key="peak_gib", goal=gib, text="{:g} GiB")


def _ms(limit: float) -> Bound:
    return Bound(key="ms", goal=limit, text="{:,.0f} ms")


def _ratio(key: str, limit: float) -> Bound:
    return Bound(key=key, goal=limit, text="{:.2f} ×")


STEP = "{ms:,.1f} ms · {tokens_per_s:,} tok/s · {peak_gib:.1f} GiB"
POWER = "power: {sm_mhz:,.0f} MHz at {power_w} W, the clock held back {power_capped:.0%} of the time"
LINES = (
    Line(
        item="one-2x2048", work="bf16, 2 × 2048", ours=STEP, bounds=(_faster(18000, 17000), _within(28)),
        peer_item="one-2x2048", obstacle=POWER,
    ),
    Line(
        item="fp8-2x2048", work="frozen base in fp8, 2 × 2048", ours=STEP, bounds=(_faster(25000, 22500),), obstacle=POWER
    ),
    Line(item="fp8-4x2048", work="frozen base in fp8, 4 × 2048", ours=STEP),
    Line(
        item="one-4x2048-recompute", work="bf16, 4 × 2048, recompute", ours=STEP, bounds=(_faster(14000, 12500), _within(18)),
        peer_item="one-4x2048-recompute", obstacle=POWER,
    ),
    Line(item="one-1x512", work="one adapter, 1 × 512", ours=STEP, bounds=(_ms(60),), peer_item="one-1x512"),
    Line(
        item="packed-1x512", work="one adapter, eight examples of 64 packed into a row", ours="{ms:,.1f} ms",
        beside="kernel by kernel: {uncaptured_ms:,.1f} ms", ratio="ratio", anywhere=True,
    ),
    Line(
        item="eight-8x512", work="eight adapters, 512 tokens each", ours=STEP, bounds=(_ms(250),), peer_item="one-1x512",
        peer_repeats=8, anchor_ms=210,
    ),
    Line(
        item="many-64", work="64 adapters, ranks 4 to 64, 4,096 tokens: forward and backward ({layers} blocks)",
        ours="{ms:,.1f} ms", beside="one adapter of rank {mean_rank}: {one_ms:,.1f} ms", ratio="ratio",
        bounds=(_ratio("ratio", 1.1),), cut=True,
    ),
    Line(
        item="many-64", work="the same, whole step ({layers} blocks)", ours="{step_ms:,.1f} ms",
        beside="one adapter: {one_step_ms:,.1f} ms", ratio="step_ratio", bounds=(_ratio("step_ratio", 1.1),), cut=True,
        obstacle="AdamW's bytes, 32 for each of 2.18 G parameters, 23.3 ms at 3 TB/s",
    ),
    Line(
        item="nf4-2x2048-recompute", work="4-bit base (NF4), 2 × 2048, recompute, capped at 24 GiB", ours=STEP,
        peer_item="nf4-2x2048-recompute", beat_peer=True, anywhere=True,
        obstacle="what cuBLAS held for the captures of the checks before, 64 MiB each, given back since 0dadef3",
    ),
    Line(
        item="inference-peak", work="training peak over inference peak, recompute, 1 × 2048", ours="{peak_gib:.2f} GiB",
        beside="inference: {inference_peak_gib:.2f} GiB", ratio="ratio", what="the memory", bounds=(_ratio("ratio", 1.15),),
    ),
    Line(
        item="merged-forward", work="merged model's forward, 2 × 2048", ours="{ms:,.2f} ms",
        beside="plain base: {base_ms:,.2f} ms",
        ratio="ratio", bounds=(_ratio("ratio", 1.01),),
    ),
    Line(
        item="start", work="a loaded model (bf16, one adapter) to its first step, no cached code", ours="{first_step_s:.0f} s",
        bounds=(Bound(key="first_step_s", goal=60, text="{:.0f} s"),),
    ),
    Line(
        item="longest", work="longest row that was seen to train on a card of 80 GB, recompute",
        ours="{tokens:,} tokens · {peak_gib:.1f} GiB, held to {limit_gib:g} GiB", anywhere=True,
    ),
)  # fmt: skip
ANYWHERE = frozenset(line.item for line in LINES if line.anywhere)
PEER_ITEMS = {line.item: line.peer_item for line in LINES if line.peer_item is not None}
"""Item to the peers' item that is compared with."""
KERNELS = Bound(key="fraction", goal=0.85, at_most=False, text="{:.2f}")
"""Of the rate of a copy of the same bytes, or of torch's own product."""
KERNELS_OBSTACLE = "the latency of a step of their loops, not bytes"
"""As `obstacle` above: LOG.md, 2026-11-28, on an H200, whose faster copies change their times little."""
