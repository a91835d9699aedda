"""CUDA graphs of a decode step: captured once, then started by one call each.

A small model's kernels take a few microseconds, and Python and the driver as much again to start
each.  A graph starts dozens at once.  What it holds is addresses, not values: it reads its inputs
from the same buffers and leaves its outputs in the same buffers each time, and whatever changes
from step to step (the position, the sequence's cache) must lie in one.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

R = TypeVar("R")


@dataclass(frozen=True)
class Graph(Generic[R]):
    """What a captured function did: ``replay`` does it again, into the same ``outputs``, in the
    order of the current stream."""

    replay: Callable[[], None]
    outputs: R


Capturing = Callable[[Callable[[], Any]], Graph[Any] | None]
"""Makes graphs, as ``CudaGraphs`` does."""


class CudaGraphs:
    """Captures one backend's graphs.  They share a memory pool, since they never run at once.

    A pool's handle dies with the last graph that was captured into it, so no two backends share
    one, and a capture that fails is the last; but one that finds no memory is tried again when 64
    graphs more have been asked for, then when twice as many have.
    """

    # Graphs that CUDA has spoiled: torch's allocator of page-locked RAM keeps their address.
    _spoiled: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: _POOL_HANDLE | None = None
        self._failed = False
        self._pause, self._next_pause = 0, 64  # graphs that are asked for in vain

    def __call__(self, function: Callable[[], R]) -> Graph[R] | None:
        """What ``function`` does, as a graph.  It runs at least once and must not make the host
        wait for the device.  None where a capture has failed, which is said."""
        if self._failed or self._pause:
            self._pause = max(0, self._pause - 1)
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()  # kernels compile and load, which a capture forbids
            self._stream.synchronize()
            try:
                graph = self._capture(function)
            except Exception as problem:
                graph, self._failed = None, not isinstance(problem, torch.OutOfMemoryError)
                if not self._failed:
                    self._pause, self._next_pause = self._next_pause, 2 * self._next_pause
                told = str(problem).partition("\n")[0]
                logging.getLogger("slotmoe").warning(
                    "a CUDA graph could not be captured (%s); steps go on without, slower", told
                )
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    def _capture(self, function: Callable[[], R]) -> Graph[R]:
        graph = torch.cuda.CUDAGraph()
        pool, self._pool = self._pool or torch.cuda.graph_pool_handle(), None
        try:
            # Readers in other threads go on copying, which a capture of all threads would forbid.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            finally:
                graph.capture_end()
        except BaseException:
            # A capture that CUDA has spoiled ends before torch's allocator has stopped recording
            # for it, and while it records nothing can be given back.  torch has no public way.
            with suppress(RuntimeError):  # it had stopped
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                CudaGraphs._spoiled.append(graph)
            raise
        self._pool = pool
        return Graph(graph.replay, outputs)


class Captured(Generic[R]):
    """Runs a function of a tensor as a captured graph where ``graph`` makes one, and plainly where
    that is None or makes None.

    ``buffer`` is the input that it reads: an input that lies elsewhere is copied there first.  The
    outputs are valid until the next call.  With gradients on, or for an input of another shape or
    type than the buffer's, the function runs plainly.  A capture runs the function before the first
    replay, so it must not write its own ``buffer``.

    Each call brings the function, always the same: a method that was kept here would keep its
    object, and with that the memory of a model that was closed.
    """

    def __init__(self, buffer: Tensor, graph: Capturing | None):
        self._buffer, self._make = buffer, graph
        self._graph: Graph[R] | None = None

    def __call__(self, function: Callable[[Tensor], R], given: Tensor) -> R:
        if self._make is None or torch.is_grad_enabled():
            return function(given)
        buffer = self._buffer
        if given is not buffer:
            kind = given.shape, given.dtype, given.device
            if not given.is_contiguous() or kind != (buffer.shape, buffer.dtype, buffer.device):
                return function(given)
            if given.data_ptr() != buffer.data_ptr():
                buffer.copy_(given)
        self._graph = self._graph or self._make(lambda: function(buffer))
        if self._graph is None:
            return function(buffer)
        self._graph.replay()
        return self._graph.outputs
