"""CUDA graphs of a decode step: captured once, then started by one call each.

A small model's kernels take a few microseconds, and Python and the driver as much again to start
each.  A graph starts dozens at once.  What it holds is addresses, not values: it reads its inputs
from the same buffers and leaves its outputs in the same buffers each time, and whatever changes
from step to step (the position, the sequence's cache) must lie in one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """Work on a CUDA device that can be repeated, in the order of the current stream.

    It is made from a function without arguments, which it runs at least once and which must not
    make the host wait for the device.  What that returned is ``outputs``, and ``replay`` repeats
    the work into it.
    """

    # One stream and one memory pool for all: graphs of a step never run at the same time.
    _stream: torch.cuda.Stream | None = None
    _pool: Any = None

    def __init__(self, function: Callable[[], Any]):
        cls = CudaGraph
        if cls._stream is None:
            cls._stream, cls._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        cls._stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(cls._stream):
            function()  # kernels compile and load, which a capture forbids
            cls._stream.synchronize()
            # Readers in other threads go on copying, which a capture of all threads would forbid.
            self._graph.capture_begin(pool=cls._pool, capture_error_mode="thread_local")
            try:
                self.outputs = function()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(cls._stream)

    def replay(self) -> None:
        self._graph.replay()


class Captured:
    """Runs a function of tensors as a captured graph where ``graph`` makes one, and plainly where
    that is None.

    ``graph`` makes what has the interface of ``CudaGraph``.  ``buffers`` are the inputs that it
    reads: an input that lies elsewhere is copied into its buffer first.  The outputs are valid
    until the next call.  Inside another graph's capture, with gradients on, or for inputs of other
    shapes or types than the buffers', the function runs plainly.  A capture runs the function
    before the first replay, so it must not write its own ``buffers``.

    Each call brings the function, always the same: a method that was kept here would keep its
    object, and with that the memory of a model that was closed.
    """

    capturing = False  # whether a capture is under way

    def __init__(
        self, buffers: tuple[Tensor, ...], graph: Callable[[Callable[[], Any]], Any] | None
    ):
        self._buffers, self._make = buffers, graph
        self._graph: Any = None

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        possible = not (Captured.capturing or torch.is_grad_enabled())
        if self._make is None or not possible or not self._fit(inputs):
            return function(*inputs)
        for buffer, given in zip(self._buffers, inputs, strict=True):
            if given.data_ptr() != buffer.data_ptr():
                buffer.copy_(given)
        if self._graph is None:
            Captured.capturing = True
            try:
                self._graph = self._make(lambda: function(*self._buffers))
            finally:
                Captured.capturing = False
        self._graph.replay()
        return self._graph.outputs

    def _fit(self, inputs: tuple[Tensor, ...]) -> bool:
        return all(
            buffer.shape == given.shape
            and buffer.dtype == given.dtype
            and buffer.device == given.device
            and given.is_contiguous()
            for buffer, given in zip(self._buffers, inputs, strict=True)
        )
