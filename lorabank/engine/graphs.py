"""CUDA graphs of whole passes: forward and backward of a batch shape that comes again are started as one, not kernel by kernel.

A step of few tokens is bound by the host, which starts thousands of kernels; a graph starts them all at once. The captured pass
reads its batch from tensors that are refilled for each replay, and leaves its gradients in tensors that the leaves then point at.

All graphs of an engine share one pool of memory: they never run at the same time, so together they need what the largest needs,
and their gradients. A gradient that still lies in there is copied out before another graph runs.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from lorabank.engine.gradients import add
from lorabank.engine.parts import is_out_of_memory
from lorabank.notices import warn_once

SEEN_BEFORE = 2
"""Passes of a shape that run kernel by kernel, which compiles and warms up what they need, before it is captured."""
KEPT = 4
"""Graphs kept at a time: each holds on to gradients of its own."""
MOST = 16
"""The same where gradients are small beside the device's memory: rows of many lengths have many shapes."""
HELD = 2
"""Those among which some hold the host's memory, of which a large model's pass takes gigabytes."""
SHARE = 1 / 64
"""Of the device's memory, for gradients of all graphs beyond the first `KEPT`."""
IDLE = 64
"""Passes for which a graph wasn't used before another may take its place: capturing takes longer than it saves in a few."""
WASTED = 3
"""Times that memory may run out before the graphs that were let go for it were replayed `IDLE` times; then none are captured."""

_ONE_AT_A_TIME = threading.Lock()
"""torch allows one capture in a process."""

Pass = Callable[[Sequence[Tensor]], Tensor]
"""(the batch's tensors on the device) → each row's loss, once backward has left its gradients in the leaves."""


class UnforeseenError(Exception):
    """Raised by a pass that is being captured, for what passes before didn't show: it isn't kept, and a later one may be."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    row_losses: Tensor
    leaves: list[nn.Parameter]
    gradients: list[Tensor]
    """Of each leaf."""
    held: tuple[object, ...] = ()
    """What must live as long, such as host memory that is copied to."""
    nbytes: int = 0
    """Of the gradients."""
    used: int = 0
    """Number of the pass that it was used in last."""


class PassGraphs:
    """The graphs of one engine, or of one loop of a user's own."""

    def __init__(self, switch: str = "Engine(cuda_graphs=False)") -> None:
        """`switch`: what leaves captures out, for messages."""
        self._switch = switch
        self._seen: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._last: _Captured | None = None
        self._too_large: set[Hashable] = set()
        self._passes = 0
        self._replays = 0
        """Since graphs were last dropped for want of memory."""
        self._wasted = 0
        """How often they were before that many replays that they were worth their captures."""
        self._halved = 0
        """How often memory ran out, and half of the graphs had to do from then on."""
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        """Of the GPU that the pool is on: captures share it as they share the pool."""
        self.refused: str | None = None
        """Why passes aren't captured any more, if one couldn't be."""

    def run(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        leaves: Callable[[], Sequence[nn.Parameter]],
        compute: Pass,
        holds: list[object] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Tensor:
        """Each row's loss, gradients added to `leaves()`. `key`: all that a pass depends on besides the values of `tensors`.

        `holds`: where `compute` puts what a captured pass needs as long as it is kept; None: nothing beyond device memory.
        `prepare`: what must be done before a capture, and can't be inside.
        """
        key = _whole(key, tensors)
        self._passes += 1
        found = self._captured.get(key)
        if found is None and not (self._worth_capturing(key) and self._prepared(key, prepare)):
            self._seen[key] += 1
            return compute(tensors)
        if found is None or found is not self._last:
            self._rescue()
        trained = found.leaves if found is not None else leaves()
        before = _taken_off(trained)
        try:
            if found is None:
                found = self._capture(key, tensors, trained, compute, holds)
            row_losses = None if found is None else self._replay(key, found, tensors)
        except BaseException:  # it may be tried again, from where this began
            for leaf in trained:
                leaf.grad = None
            add(before)
            raise
        add(before)
        return compute(tensors) if row_losses is None else row_losses

    def _replay(self, key: Hashable, found: _Captured, tensors: Sequence[Tensor]) -> Tensor:
        row_losses = torch.empty_like(found.row_losses)  # now, while nothing has run that would have to be undone
        for mine, given in zip(found.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        found.graph.replay()
        row_losses.copy_(found.row_losses)
        for leaf, gradient in zip(found.leaves, found.gradients, strict=True):
            leaf.grad = gradient
        self._captured.move_to_end(key)
        self._replays += 1
        found.used, self._last = self._passes, found
        return row_losses

    def seen(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Count a pass that showed only once it had run what others like it are given."""
        self._seen[_whole(key, tensors)] += 1

    def refuse(self, reason: str) -> None:
        """Capture no passes from here on, and say so."""
        self.refused = reason
        warnings.warn(
            "this model's passes can't be captured as CUDA graphs, so they run kernel by kernel and small ones wait for the "
            f"host ({reason}). {self._switch} silences this.",
            stacklevel=3,
        )

    def _worth_capturing(self, key: Hashable) -> bool:
        if self.refused is not None or self._seen[key] < SEEN_BEFORE or key in self._too_large:
            return False
        oldest = next(iter(self._captured.values()), None)
        return oldest is None or len(self._captured) < self.kept or self._passes - oldest.used > IDLE

    def _prepared(self, key: Hashable, prepare: Callable[[], None] | None) -> bool:
        """Whether all is there that a capture needs, and room for its graph. No gradient has been touched."""
        while len(self._captured) >= self.kept:
            self._captured.popitem(last=False)
        # an old pass that only a cycle of references keeps alive has accumulators of gradients on another stream, which is
        # not allowed beside a capture
        gc.collect()
        try:
            if prepare is not None:
                prepare()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._too_large.add(key)
            warn_once(
                f"some passes aren't captured as CUDA graphs, so small ones wait for the host: {str(error).splitlines()[0]}."
            )
            return False
        return True

    @property
    def kept(self) -> int:
        """Graphs kept at a time."""
        largest = max((made.nbytes for made in self._captured.values()), default=0)
        fit = int(SHARE * _memory(next(iter(self._captured.values())).gradients) / largest) if largest else KEPT
        most = HELD if any(made.held for made in self._captured.values()) else MOST
        return max(1, min(most, max(KEPT, fit)) >> self._halved)

    def _rescue(self) -> None:
        """Copy gradients of the graph that ran last out of the pool: what runs now may write over them."""
        last, self._last = self._last, None
        if last is None:
            return
        held = [i for i, leaf in enumerate(last.leaves) if leaf.grad is last.gradients[i]]
        for i, copy in zip(held, _copies([last.gradients[i] for i in held]), strict=True):
            last.leaves[i].grad = copy

    def drop(self) -> bool:
        """Give the graphs' memory back; shapes are captured again when they come again. True when there were any."""
        held = self.any
        self.forget()
        self._halved += 1
        if held:
            self._wasted, self._replays = self._wasted + (self._replays < IDLE), 0
            if self._wasted == WASTED and self.refused is None:
                self.refuse("beside graphs there is too little memory for passes of other shapes")
        return held

    @property
    def any(self) -> bool:
        """Whether graphs are kept."""
        return bool(self._captured)

    def forget(self) -> None:
        """Let go of graphs of a bank or of blocks that have changed since: nothing would replay them again."""
        self._rescue()
        for made in self._captured.values():
            if made.held:
                _synchronize(made.inputs)  # a replay may still copy to what is held
        self._captured.clear()
        self._seen.clear()

    def _capture(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        leaves: Sequence[nn.Parameter],
        compute: Pass,
        holds: list[object] | None,
    ) -> _Captured | None:
        current = _current_stream(tensors)
        try:
            inputs = [tensor.clone() for tensor in tensors]
            graph = torch.cuda.CUDAGraph()
            if not self._captured:
                self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone can't be used again
            if current is not None and (self._stream is None or self._stream.device != current.device):
                self._stream = torch.cuda.Stream(current.device)
            # torch's own stream for captures is of the GPU that the process captured on first; and other threads may do what they
            # like meanwhile (a loader pins memory), while what backward's do on this stream is captured all the same
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with _ONE_AT_A_TIME, _on_device(current), _own_workspaces(current), capture:
                row_losses = compute(inputs)
        except Exception as error:  # noqa: BLE001  whatever a model does that can't be captured: it still trains without a graph
            if current is not None:
                _capture_failed(current, self._pool)
            if is_out_of_memory(error):
                self._too_large.add(key)
                _cleared(leaves, tensors)
                return None
            _cleared(leaves, tensors)
            if isinstance(error, UnforeseenError):
                del self._seen[key]
            else:
                self.refuse(_reason(error))
            return None
        given = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
        trained, gradients = [leaf for leaf, _ in given], [gradient for _, gradient in given]
        self._captured[key] = _Captured(
            graph, inputs, row_losses, trained, gradients, tuple(holds or ()), sum(gradient.nbytes for gradient in gradients)
        )  # fmt: skip
        return self._captured[key]


def _reason(error: Exception) -> str:
    """Why a pass couldn't be captured, in a line."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    frames = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
    if not isinstance(error, TorchDynamoException) and "torch._dynamo.convert_frame" not in frames:
        return said
    return (
        "a capture can't compile, and a block or norm got other arguments in it than in passes before. Where those are masks or "
        f"positions that the model makes itself, give it an attention mask and position_ids from the batch. {said[:300]}"
    )


def _whole(key: Hashable, tensors: Sequence[Tensor]) -> Hashable:
    return key, tuple((t.shape, t.dtype) for t in tensors)


def _current_stream(tensors: Sequence[Tensor]) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(tensors[0].device) if tensors and tensors[0].is_cuda else None


def _memory(tensors: Sequence[Tensor]) -> int:
    """Bytes that the device has on which these lie; 0 where it isn't a GPU."""
    return torch.cuda.get_device_properties(tensors[0].device).total_memory if tensors and tensors[0].is_cuda else 0


def _taken_off(leaves: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """The leaves' gradients of earlier passes, copied: they may lie in a graph's own memory, which a replay writes over.

    The GPU waits while this looks at each of tens of thousands of leaves, so it does so once.
    """
    held = [leaf for leaf in leaves if leaf.grad is not None]
    kept = list(zip(held, _copies([leaf.grad for leaf in held if leaf.grad is not None]), strict=True))
    for leaf in held:
        leaf.grad = None
    return kept


def _copies(tensors: list[Tensor]) -> Sequence[Tensor]:
    """In a few launches, not one each: a number times 1 is the same to the last bit, and NaN stays NaN."""
    return torch._foreach_mul(tensors, 1.0) if tensors else ()  # pyright: ignore[reportPrivateImportUsage]


def _cleared(leaves: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    """After a capture that broke off: what it left in the leaves was never computed."""
    for leaf in leaves:
        leaf.grad = None
    _synchronize(tensors)


def _capture_failed(stream: torch.cuda.Stream, pool: Any) -> None:
    """Where ending a capture fails, too, torch leaves the stream current, and its allocator (2.11) in the capture for good."""
    with _on_device(stream):
        torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError, TypeError):  # it is in none
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)


@contextlib.contextmanager
def _own_workspaces(current: torch.cuda.Stream | None) -> Iterator[None]:
    """Give up what cuBLAS keeps to compute in, 32 MiB on Hopper for each thread and stream that it ran on.

    A capture, whose stream is another, takes such memory out of the graphs' pool, and after it so may another: they never run
    together. What runs kernel by kernel later gets it anew.
    """
    if current is None:
        yield
        return
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _synchronize(tensors: Sequence[Tensor]) -> None:
    """Wait for the GPU on which these lie."""
    torch.cuda.synchronize(tensors[0].device if tensors and tensors[0].is_cuda else None)


def _on_device(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.device(stream.device)
