"""The graphs of a backend under torch's rules of memory pools, which a fake of its allocator holds.

A handle of a pool dies with the last graph that was captured into it; the next capture into it is
torch's internal error.  ``capture_end`` of a spoiled capture raises before the allocator has
stopped recording, and while it records, nothing can be given back.
"""

import contextlib
import weakref
from collections import Counter
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from slotmoe.quant.backends.graphs import Captured, CudaGraphs

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


class Stop(KeyboardInterrupt):
    pass


class Graph:
    def __init__(self, allocator):
        self._allocator = allocator

    def capture_begin(self, pool, capture_error_mode):
        allocator = self._allocator
        allocator.captures += 1
        assert capture_error_mode == "thread_local"
        assert pool not in allocator.dead, "use_count > 0"
        assert pool not in allocator.recording, "already recording"
        allocator.recording.append(pool)
        self._pool, self._spoiled = pool, allocator.captures == allocator.spoiled

    def capture_end(self):
        if self._spoiled:
            raise RuntimeError("CUDA error: operation failed due to a previous error\nmore")
        self._allocator.recording.remove(self._pool)
        self._allocator.users[self._pool] += 1
        weakref.finalize(self, self._allocator.freed, self._pool)

    def replay(self):
        pass


class Allocator:
    """Stands in for ``torch.cuda`` where graphs are captured, of which CUDA spoils the
    ``spoiled``-th."""

    def __init__(self, patch):
        self.spoiled = self.captures = 0
        self.users, self.dead, self.recording = Counter(), set(), []
        handles = count(1)
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        for name, fake in {
            "CUDAGraph": partial(Graph, self),
            "graph_pool_handle": lambda: (0, next(handles)),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "current_device": lambda: 0,
            "stream": lambda _: contextlib.nullcontext(),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)

    def freed(self, pool):
        self.users[pool] -= 1
        if not self.users[pool]:
            self.dead.add(pool)

    def _end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)


@pytest.fixture
def allocator(monkeypatch):
    """At the end nothing goes on recording."""
    made = Allocator(monkeypatch)
    yield made
    assert not made.recording, "captures_underway.empty()"


def captured(graphs, work=lambda x: x + 1):
    """A function of one buffer that is captured when it is called."""
    made = Captured(torch.zeros(1), graphs)
    return lambda: made(work, torch.ones(1)).item()


def test_graphs_of_one_backend_share_a_pool_and_another_backend_has_its_own(allocator):
    """A model is opened, decodes, is closed; the next one captures into a pool that lives."""
    for opened in range(1, 4):
        graphs = CudaGraphs()
        steps = [captured(graphs), captured(graphs)]
        for step in steps:
            step()
        assert len(allocator.users) == opened and allocator.users[(0, opened)] == 2
        del steps, step, graphs
    assert len(allocator.dead) == 3


@pytest.mark.parametrize("failure", ["a capture", torch.OutOfMemoryError("no memory"), Stop()])
def test_what_fails_while_it_is_captured_ends_the_capture(allocator, caplog, failure):
    """It is said once, and the work goes on without graphs; another backend is not concerned.  An
    interrupt spoils nothing."""
    runs, allocator.spoiled = [], 2 if failure == "a capture" else 0

    def work(x):
        runs.append(x)
        if len(runs) == 2 and isinstance(failure, BaseException):  # the first is before the capture
            raise failure
        return x + 1

    graphs = CudaGraphs()
    steps, interrupted = [captured(graphs, work) for _ in range(3)], isinstance(failure, Stop)
    if interrupted:
        with pytest.raises(Stop):
            steps[0]()
    for _ in range(2):
        assert [step() for step in steps] == [2, 2, 2]
    told = [record.message for record in caplog.records]
    assert len(told) == (not interrupted)
    assert all(text.startswith("a CUDA graph could not be captured (") for text in told)
    before = allocator.captures
    assert captured(CudaGraphs())() == 2 and allocator.captures == before + 1
