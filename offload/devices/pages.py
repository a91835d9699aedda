"""Memory for weights and records: page-aligned, in large pages where the system has them."""

import ctypes
import gc
import math
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from slotmoe.system import ROOM, hold, lie_on, private_pages, step_back

TOUCHED_AT_ONCE = 16 << 20  # bytes between two looks at whether to stop
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def page_aligned(count: int, forks: bool = True, nodes: Sequence[int] = ()) -> Tensor:
    """``count`` bytes of page-aligned zeros, uint8; pages cost nothing until written, and lie on
    ``nodes``, if given and allowed.  Without ``forks`` a child process has no such memory: a write
    after a fork would move a page away from under the device that copies from it."""
    memory = torch.frombuffer(private_pages(count, forks), dtype=torch.uint8)
    if nodes:
        lie_on(nodes, memory.data_ptr(), count)
    return memory


def in_large_pages(shape: tuple[int, ...], dtype: torch.dtype, nodes: Sequence[int] = ()) -> Tensor:
    """A zero CPU tensor, in large pages from 4 MiB on where the system has them."""
    return page_aligned(math.prod(shape) * dtype.itemsize, nodes=nodes).view(dtype).view(shape)


def give_back_memory() -> None:
    """Give the system what is free, or held only by objects that refer to each other: Python looks
    for those rarely, and the C library keeps what they had."""
    gc.collect()
    with suppress(AttributeError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def tune_heap() -> None:
    """Let all threads allocate from one heap, which keeps what is freed for the next pass.  The C
    library gives each thread a heap of its own, and what is free in one is nothing to the others.
    It gives a pass's memory back to the system each time, and the first writes to new pages take
    up to a third of a prefill's time in a virtual machine."""
    with suppress(AttributeError, TypeError):  # another C library than GNU's
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_TRIM_THRESHOLD, 1 << 30)


class Touching:
    """A thread that makes the pages of ``memory`` (uint8, zero, on the CPU) present, from byte
    ``start`` on, so that neither the disk nor the first tokens wait for it.  The first write to a
    page costs as much as reading it from a disk, or several times that in a virtual machine."""

    def __init__(self, memory: Tensor, start: int):
        self._memory, self._stop, self.start = memory, False, start
        self.ready = start  # bytes from the beginning that cost nothing more
        self._thread = threading.Thread(target=self._run, name="slotmoe-touch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        step_back()
        hold(self._memory.data_ptr(), self.start)
        while self.ready < len(self._memory) and not self._stop:
            piece = self._memory[self.ready : self.ready + TOUCHED_AT_ONCE]
            # Unlike a torch operation, never on several threads.
            ctypes.memset(piece.data_ptr(), 0, len(piece))
            hold(piece.data_ptr(), len(piece))
            self.ready += len(piece)

    def finish(self) -> None:
        """Wait for the last page."""
        self._thread.join()

    def close(self) -> None:
        """Stop early."""
        self._stop = True
        self._thread.join()


class Arena:
    """Tensors side by side in large pages: where an address costs two walks through page tables, as
    in a virtual machine, reading them this way is 10 to 15% faster.

    ``reuse`` takes the last chunk again from its beginning: fresh pages cost more than a copy.
    """

    def __init__(self, chunk_bytes: int = ROOM, alignment: int = 64, nodes: Sequence[int] = ()):
        self._chunk_bytes, self._alignment, self._lock = chunk_bytes, alignment, threading.Lock()
        self._nodes = nodes
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor, aligned."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + size > len(self._chunk):
                # There is room for what follows; tensors keep the old chunk alive.
                self._chunk = page_aligned(size + self._chunk_bytes, nodes=self._nodes)
                self._used = 0
                hold(self._chunk.data_ptr(), len(self._chunk))
            memory = self._chunk[self._used : self._used + size]
            self._used += -(-size // self._alignment) * self._alignment
        return memory.view(dtype).view(shape)

    def reuse(self) -> None:
        """Nothing that this arena has given is needed any more."""
        self._used = 0
