"""What activation checkpointing keeps, each block's input, in the host's memory instead of the GPU's.

Copies run on a stream of their own, from and to pinned memory: out while the next block computes, back while the block after it
does. So they cost time only where a block is done faster than its input crosses the bus.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Kind = tuple[torch.Size, torch.dtype, torch.device]


@dataclass
class _Kept:
    """A block's input on the host, and on its way back once somebody is about to ask for it."""

    place: int
    host: Tensor
    device: torch.device
    back: tuple[Tensor, torch.cuda.Event | None] | None = None
    given: weakref.ref[Tensor] | None = None
    """What was handed back, for who asks twice."""

    @property
    def kind(self) -> _Kind:
        """Whose buffer may be used again for what."""
        return self.host.shape, self.host.dtype, self.device


class Offload:
    """The block inputs of one pass after the other."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._free: defaultdict[_Kind, list[Tensor]] = defaultdict(list)
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        """The input that is being copied out, held until then."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.bytes = 0
        """Copied to the host so far, over all passes."""

    def start(self) -> None:
        """Begin a pass: what the last one left, where it had no backward, is given up."""
        used = {kept.kind for kept in self._kept}
        for kept in self._kept:
            self._give_up(kept)
        self._kept.clear()
        for kind in self._free.keys() - used if used else ():
            del self._free[kind]  # another shape's: rows of many lengths would pin more and more of the host's memory

    def around(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function, `recompute(block, x, …)`, that keeps x on the host."""

        @functools.wraps(recompute)
        def call(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x = next((value for value in args if isinstance(value, Tensor)), None)
            if x is None:
                return recompute(block, *args, **kwargs)

            mine: list[_Kept] = []
            address, shape = x.data_ptr(), x.shape  # torch keeps the hook as long as what it packed: it must not hold on to x

            def pack(saved: Tensor) -> Tensor | _Kept:
                # hooks get detached tensors; of the inputs that are saved, masks and tables are shared by all blocks
                if saved.data_ptr() != address or saved.shape != shape:
                    return saved
                if not mine:
                    mine.append(self._out(saved))
                return mine[0]

            with saved_tensors_hooks(pack, self._back):
                return recompute(block, *args, **kwargs)

        return call

    def _out(self, x: Tensor) -> _Kept:
        self._let_go()
        free = self._free[x.shape, x.dtype, x.device]
        host = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        stream = self._stream(x.device)
        if stream is None:
            host.copy_(x)
        else:
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
            self._leaving = x, _event(stream)
        self.bytes += x.numel() * x.element_size()
        self._kept.append(_Kept(len(self._kept), host, x.device))
        return self._kept[-1]

    def _back(self, saved: Tensor | _Kept) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        given = None if saved.given is None else saved.given()
        if given is not None:
            return given
        self._let_go()
        x, arrived = self._fetch(saved)
        if arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(arrived)
        saved.back, saved.given = None, weakref.ref(x)
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
        with torch.cuda.stream(stream):
            x.copy_(kept.host, non_blocking=True)
        return x, _event(stream)

    def _let_go(self) -> None:
        """Drop the input that was copied out while its block computed. Its memory is used again on this stream alone."""
        if self._leaving is not None:
            x, left = self._leaving
            torch.cuda.current_stream(x.device).wait_event(left)
            self._leaving = None

    def _give_up(self, kept: _Kept) -> None:
        # copies are put on one stream in order, so what comes into this memory next comes after what left it
        self._free[kept.kind].append(kept.host)
        if kept.back is not None and kept.back[1] is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.back[1])
        kept.back = kept.given = None

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """When what was put on a stream so far is done."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
