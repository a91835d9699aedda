"""Memory for weights and records: page-aligned, in large pages where the system has them."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

TOUCHED_AT_ONCE = 16 << 20  # bytes between two looks at whether to stop


def page_aligned(count: int) -> Tensor:
    """``count`` bytes of page-aligned zeros, uint8; pages cost nothing until written."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would get small pages
    region = mmap.mmap(-1, count, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE") and count >= 4 << 20:
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zero CPU tensor, in large pages from 4 MiB on where the system has them."""
    return page_aligned(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


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
        with suppress(OSError):  # Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while self.ready < len(self._memory) and not self._stop:
            piece = self._memory[self.ready : self.ready + TOUCHED_AT_ONCE]
            # Unlike a torch operation, never on several threads.
            ctypes.memset(piece.data_ptr(), 0, len(piece))
            self.ready += len(piece)

    def finish(self) -> None:
        """Wait for the last page."""
        self._thread.join()

    def close(self) -> None:
        """Stop early."""
        self._stop = True
        self._thread.join()


class Arena:
    """Weights side by side in large pages: where an address costs two walks through page tables, as
    in a virtual machine, reading them this way is 10 to 15% faster."""

    def __init__(self, chunk_bytes: int = 64 << 20):
        self._chunk_bytes, self._lock = chunk_bytes, threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor at a multiple of 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if size > len(self._free):
                self._free = page_aligned(max(size, self._chunk_bytes))
            memory, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return memory.view(dtype).view(shape)


class Staging:
    """Memory used again for each weight on its way: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffer, self._used = page_aligned(4096), 0

    def fresh(self) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
        """A function ``empty(shape, dtype)`` whose tensors hold until ``fresh`` is called again."""
        self._used = 0
        return self._empty

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._buffer):
            # What came before keeps the old buffer alive; the margin has room for the scales that
            # follow a matrix.
            self._buffer, self._used = page_aligned(size + (4 << 20)), 0
        memory = self._buffer[self._used : self._used + size]
        self._used += -(-size // 4096) * 4096
        return memory.view(dtype).view(shape)
