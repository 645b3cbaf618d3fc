"""What activation checkpointing keeps, each block's input, in the host's memory instead of the GPU's.

Copies run on a stream of their own, from and to pinned memory: out while the next block computes, back while the block after it
does. So they cost time only where a block is done faster than its input crosses the bus.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Kept:
    """A block's input on the host, and on its way back once somebody is about to ask for it."""

    place: int
    host: Tensor
    device: torch.device
    back: tuple[Tensor, torch.cuda.Event | None] | None = None


class Offload:
    """The block inputs of one pass after the other."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.bytes = 0
        """Copied to the host so far, over all passes."""

    def start(self) -> None:
        """Begin a pass: what the last one left, where it had no backward, is given up."""
        for kept in self._kept:
            self._give_up(kept)
        self._kept.clear()

    def around(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function, `recompute(block, x, …)`, that keeps x on the host."""

        @functools.wraps(recompute)
        def call(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x = next((value for value in args if isinstance(value, Tensor)), None)
            if x is None:
                return recompute(block, *args, **kwargs)

            def pack(saved: Tensor) -> Tensor | _Kept:
                # hooks get detached tensors; of the inputs that checkpoint saves, masks and tables are shared by all blocks
                return self._out(saved) if saved.data_ptr() == x.data_ptr() and saved.shape == x.shape else saved

            with saved_tensors_hooks(pack, self._back):
                return recompute(block, *args, **kwargs)

        return call

    def _out(self, x: Tensor) -> _Kept:
        free = self._free[x.shape, x.dtype]
        host = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        stream = self._stream(x.device)
        if stream is None:
            host.copy_(x)
        else:
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(stream)
        self.bytes += x.numel() * x.element_size()
        self._kept.append(_Kept(len(self._kept), host, x.device))
        return self._kept[-1]

    def _back(self, saved: Tensor | _Kept) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        x, arrived = self._fetch(saved)
        if arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(arrived)
        saved.back = None
        if saved.place > 0 and saved.place < len(self._kept):
            before = self._kept[saved.place - 1]
            before.back = self._fetch(before)  # the one that backward asks for next
        return x

    def _fetch(self, kept: _Kept) -> tuple[Tensor, torch.cuda.Event | None]:
        """A block's input on its device, and when it is there."""
        if kept.back is not None:
            return kept.back
        x = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        stream = self._stream(kept.device)
        if stream is None:
            return x.copy_(kept.host), None
        stream.wait_stream(torch.cuda.current_stream(kept.device))  # whose memory x is
        arrived = torch.cuda.Event()
        with torch.cuda.stream(stream):
            x.copy_(kept.host, non_blocking=True)
            arrived.record(stream)
        x.record_stream(stream)
        return x, arrived

    def _give_up(self, kept: _Kept) -> None:
        # copies are put on one stream in order, so what comes into this memory next comes after what left it
        self._free[kept.host.shape, kept.host.dtype].append(kept.host)
        kept.back = None

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
