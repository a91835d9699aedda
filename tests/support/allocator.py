"""torch's rules of captures and their memory pools, without a GPU: what a capture that is begun
with a dead handle, or that ends badly, does to torch's allocator.

A handle dies with the last graph that was captured into it; the next capture into it is torch's
internal error.  ``capture_end`` of a spoiled capture raises before the allocator has stopped
recording, and while it records, nothing can be given back.
"""

import contextlib
import weakref
from collections import Counter
from itertools import count
from types import SimpleNamespace

import torch


class Allocator:
    """Stands in for ``torch.cuda`` where graphs are captured.  ``spoil``: the captures, counted
    from 1, that CUDA spoils."""

    def __init__(self, monkeypatch, spoil=()):
        self.spoil, self.captures = set(spoil), 0
        self.users, self.dead, self.recording = Counter(), set(), []
        handles, allocator = count(1), self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                allocator.captures += 1
                assert capture_error_mode == "thread_local"
                assert pool not in allocator.dead, "use_count > 0"
                assert pool not in allocator.recording, "already recording"
                allocator.recording.append(pool)
                self.pool, self.spoiled = pool, allocator.captures in allocator.spoil

            def capture_end(self):
                if self.spoiled:
                    raise RuntimeError("CUDA error: operation failed due to a previous error\nmore")
                allocator.recording.remove(self.pool)
                allocator.users[self.pool] += 1
                weakref.finalize(self, allocator._freed, self.pool)

            def replay(self):
                pass

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        fakes = {
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: (0, next(handles)),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "current_device": lambda: 0,
            "stream": lambda _: contextlib.nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)

    def _freed(self, pool):
        self.users[pool] -= 1
        if not self.users[pool]:
            self.dead.add(pool)

    def _end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)

    def empty_cache(self):
        assert not self.recording, "captures_underway.empty()"
