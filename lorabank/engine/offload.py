"""What activation checkpointing keeps of each block, its input above all, in the host's memory instead of the GPU's.

Copies run on a stream of their own, from and to pinned memory: out while the next block computes, back while the block after it
does. So they cost time only where a block is done faster than what it keeps crosses the bus.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorabank.engine.host_memory import HostMemory

SHARE = 0.25
"""Of the host's memory that is left, for what one captured pass keeps there."""


@dataclass
class _Kept:
    """A tensor on the host, and on its way back once somebody is about to ask for it."""

    place: int
    """Of its block in the pass."""
    host: Tensor
    device: torch.device
    back: tuple[Tensor, torch.cuda.Event | None] | None = None
    given: weakref.ref[Tensor] | None = None
    """What was handed back, for who asks twice."""


class Offload:
    """What the blocks of one pass after the other keep."""

    def __init__(self) -> None:
        self._blocks: list[list[_Kept]] = []
        """What each block of this pass keeps: it leaves together and comes back together."""
        self._memory: dict[torch.device, HostMemory] = {}
        """Of the host, for what comes from a device."""
        self._leaving: list[tuple[_Kept, Tensor, torch.cuda.Event | None]] = []
        """The last block's tensors, held until they are copied out."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._needed: dict[Hashable, dict[torch.device, list[int]]] = {}
        """Bytes of each tensor that passes of a kind were seen to keep, in order."""
        self._captured = False
        self.bytes = 0
        """Copied to the host so far, over all passes."""

    def start(self) -> None:
        """Begin a pass: what the last one left, where it had no backward, is given up."""
        self._let_go()
        for kept in (kept for block in self._blocks for kept in block):
            # copies are put on one stream in order, so what comes into this memory next comes after what left it
            if kept.back is not None and kept.back[1] is not None:
                torch.cuda.current_stream(kept.device).wait_event(kept.back[1])
            kept.back = kept.given = None
        self._blocks.clear()
        for memory in self._memory.values():
            memory.restart()

    def remember(self, key: Hashable) -> None:
        """Note what the pass that was just made kept: the next of its kind will keep as much."""
        self._needed[key] = {device: memory.sizes for device, memory in self._memory.items()}

    def reserve(self, key: Hashable) -> None:
        """Set aside what such a pass keeps: torch never frees pinned memory that it gave away inside a capture.

        Raises torch.OutOfMemoryError where that takes much of what the host has left: a captured pass keeps it.
        """
        for device, sizes in self._needed.get(key, {}).items():
            self._memory[device].make_room(sizes, SHARE)

    def for_capture(self, key: Hashable) -> Offload:
        """For one such pass that is captured as a CUDA graph, whose replays copy to and from the same host memory.

        It takes reserved memory along and gives it back when it is gone: whoever holds the graph must hold it. Call `start` on
        this one before the capture begins: what was put on a stream before can't be waited for inside.
        """
        own = Offload()
        own._streams, own._captured = self._streams, True
        for device, sizes in self._needed.get(key, {}).items():
            pieces = self._memory[device].split_off(sizes)
            own._memory[device] = HostMemory(pieces, grows=False)
            weakref.finalize(own, self._memory[device].add, pieces)
        return own

    def end_capture(self) -> None:
        """Join the copies' streams, without which a capture can't end, and let go of all but the host's memory."""
        self._let_go()
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        for kept in (kept for block in self._blocks for kept in block):
            kept.back = kept.given = None

    def around(self, recompute: Callable[..., Any], lasting: Set[int] | None = None) -> Callable[..., Any]:
        """A checkpoint function, `recompute(block, x, …)`, that keeps x on the host.

        `lasting`: `storages` of the block's own tensors. With them given, what else the block saves is kept on the host too, if
        the call itself made it and there is something of every token in it.
        """

        @functools.wraps(recompute)
        def call(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x = next((value for value in args if isinstance(value, Tensor)), None)
            if x is None:
                return recompute(block, *args, **kwargs)

            mine: list[_Kept] = []
            inputs: list[_Kept] = []
            # torch keeps the hook as long as what it packed: it must not hold on to x
            address, shape, tokens = x.data_ptr(), x.shape, x.numel() // x.shape[-1]
            given = None if lasting is None else storages(_tensors((args, kwargs)))

            def made_here(saved: Tensor) -> bool:
                if lasting is None or given is None or not saved.is_floating_point() or saved.numel() < tokens:
                    return False
                storage = _storage(saved)
                return storage not in lasting and storage not in given and _dense(saved)

            def pack(saved: Tensor) -> Tensor | _Kept:
                # hooks get detached tensors; of the inputs that are saved, masks and tables are shared by all blocks
                if saved.data_ptr() != address or saved.shape != shape:
                    return self._out(saved, mine) if made_here(saved) else saved
                if not inputs:
                    inputs.append(self._out(saved, mine))
                return inputs[0]

            with saved_tensors_hooks(pack, self._back):
                return recompute(block, *args, **kwargs)

        return call

    def _out(self, x: Tensor, block: list[_Kept]) -> _Kept:
        """Begin to copy one of the tensors that a block keeps."""
        if not block:
            self._let_go()  # of the block before
            self._blocks.append(block)
        strides = x.stride() if _dense(x) else torch.empty(x.shape, device="meta").stride()
        memory = self._memory_of(x.device)
        host = memory.take(x.numel() * x.element_size()).view(x.dtype).as_strided(x.shape, strides)
        kept, left = _Kept(len(self._blocks) - 1, host, x.device), None
        stream = self._stream(x.device)
        if stream is None:
            host.copy_(x)
        else:
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
            left = _event(stream)
        self._leaving.append((kept, x, left))
        self.bytes += x.numel() * x.element_size()
        block.append(kept)
        return kept

    def _back(self, saved: Tensor | _Kept) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        given = None if saved.given is None else saved.given()
        if given is not None:
            return given
        for kept, x in self._let_go():
            kept.back = x, None  # the last block's are still here
        x, arrived = self._fetch(saved)
        if arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(arrived)
        saved.back, saved.given = None, weakref.ref(x)
        place = saved.place
        if 0 < place < len(self._blocks) and all(kept.given is not None for kept in self._blocks[place]):
            for kept in self._blocks[place - 1]:  # what backward asks for next
                kept.back = self._fetch(kept)
        return x

    def _fetch(self, kept: _Kept) -> tuple[Tensor, torch.cuda.Event | None]:
        """What was kept, on its device, and when it is there."""
        if kept.back is not None:
            return kept.back
        x = torch.empty_strided(kept.host.shape, kept.host.stride(), dtype=kept.host.dtype, device=kept.device)
        stream = self._stream(kept.device)
        if stream is None:
            return x.copy_(kept.host), None
        stream.wait_stream(torch.cuda.current_stream(kept.device))  # whose memory x is
        with torch.cuda.stream(stream):
            x.copy_(kept.host, non_blocking=True)
        return x, _event(stream)

    def _let_go(self) -> list[tuple[_Kept, Tensor]]:
        """Drop what was copied out while its successor computed. Its memory is used again on this stream alone."""
        gone = [(kept, x) for kept, x, _ in self._leaving]
        for _, x, left in self._leaving:
            if left is not None:
                torch.cuda.current_stream(x.device).wait_event(left)
        self._leaving.clear()
        return gone

    def _memory_of(self, device: torch.device) -> HostMemory:
        if device not in self._memory:
            self._memory[device] = HostMemory(pinned=device.type == "cuda", grows=not self._captured)
        return self._memory[device]

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Where tensors lie, whatever part of it they show."""
    return frozenset(map(_storage, tensors))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps, in whatever order of its dimensions: a copy can be one of its bytes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[::-1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """When what was put on a stream so far is done."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
