"""A card in RAM, really asynchronous: copies run in a thread and take as long as a test wants.

Its compute stream is the thread that computes, so ``wait`` blocks.  What a missing wait or event
would do on a real card is an assertion here: each launch says which slots it reads, and each copy
into a slot has to come after the slot's last reader and before its next.  A slot holds NaNs from
the moment its copy is queued until it has landed, and a copy reads its source late, so that what
slips through is a wrong result.
"""

import threading
import time
import weakref
from dataclasses import replace
from queue import Queue

import pytest
import torch

from slotmoe.offload import opening
from slotmoe.offload.plan.memory import make_plan
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.tiers.device import CardMemory
from slotmoe.quant.backends.base import TorchOps

GIB = 1 << 30


class Block(bytearray):
    """Memory of the card; can be watched until it is freed."""


class Point:
    """An event of the compute stream, which has happened."""

    def __init__(self, tick):
        self.tick = tick

    def done(self):
        return True

    def synchronize(self):
        pass


class TwinCopy:
    def __init__(self, twin, number):
        self._twin, self.number, self.landed, self.error, self.seconds = (
            twin,
            number,
            threading.Event(),
            None,
            0.0,
        )

    def done(self):
        if self.landed.is_set():
            self._twin.order(self.number)
        return self.landed.is_set()

    def synchronize(self):
        assert self.landed.wait(30)
        self._twin.order(self.number)


class TwinDownload:
    def __init__(self, twin, tensor):
        self._twin, self._host = twin, tensor.clone()

    def get(self):
        self._twin.syncs += 1
        return self._host


class Told:
    """Ops that tell the twin what they launch."""

    twin = None

    def experts_by_slot(self, x_TD, slab, slots_TK, layout, levels, y_TKD):
        self.twin.launch([slab[slot] for slot in slots_TK.flatten().tolist() if slot >= 0])
        super().experts_by_slot(x_TD, slab, slots_TK, layout, levels, y_TKD)

    def experts_grouped(self, x_TD, tokens_N, starts_G1, slots_G, slab, layout, levels):
        self.twin.launch([slab[slot] for slot in slots_G.tolist()])
        return super().experts_grouped(x_TD, tokens_N, starts_G1, slots_G, slab, layout, levels)


class TwinOps(Told, TorchOps):
    """Plain torch."""


class Twin:
    """``delay(n)`` seconds for the n-th copy; ``fail(n)`` may raise when it is queued, ``spoil(n)``
    says that it fails on its way; ``on_launch(n)`` acts before the n-th launch.  ``capacity``
    bytes, of which others have ``taken`` some."""

    device, name = torch.device("cpu"), "the twin"

    def __init__(self, delay=None, capacity=GIB, triton=False):
        self._triton = triton
        nothing = lambda number: None
        self.delay, self.fail, self.spoil, self.on_launch = (
            delay or (lambda number: 0.0),
            nothing,
            nothing,
            nothing,
        )
        self.capacity, self.taken, self.allocated, self.peak = capacity, 0, 0, 0
        self.syncs = self.launches = self.copies = self.released = self.pins_allowed = 0
        self.pins_allowed = 1 << 30
        self.pinned = {}  # address -> bytes
        self.unpinned_copies = 0
        self._tick, self._ordered = 0, -1
        self._read, self._written = (
            {},
            {},
        )  # slot's address -> tick of its last reader, number of its last copy
        self._lock, self._queue = threading.Lock(), Queue()
        self._thread = threading.Thread(target=self._run, args=(self._queue,), daemon=True)
        self._thread.start()
        weakref.finalize(self, self._queue.put, None)

    @staticmethod
    def _run(queue):
        while (item := queue.get()) is not None:
            copy, source, target, delay, spoiled = item
            started = time.perf_counter()
            time.sleep(delay)
            if spoiled:
                copy.error = RuntimeError("an illegal memory access")
            else:
                target.copy_(source)
            copy.seconds = time.perf_counter() - started
            copy.landed.set()
            del item, copy, source, target

    # What the seam asks for

    def ops(self, kernels, threads):
        if self._triton:
            from slotmoe.quant.backends.triton import TritonOps

            ops = type("TwinTriton", (Told, TritonOps), {})(self.device)
        else:
            ops = TwinOps(torch.float32)
        ops.twin = self
        return ops

    def empty(self, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            if self.allocated + size > self.capacity - self.taken:
                raise torch.OutOfMemoryError(f"out of memory: tried to allocate {size} bytes")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        block = Block(b"\xff" * max(size, 1))
        weakref.finalize(block, self._freed, size)
        return torch.frombuffer(block, dtype=torch.uint8)[:size].view(dtype).view(shape)

    def _freed(self, size):
        self.allocated -= size

    def record(self):
        return Point(self._tick)

    def wait(self, event):
        event.synchronize()
        if getattr(event, "error", None) is not None:
            raise event.error

    def copy(self, source, target, after):
        with self._lock:
            self.copies += 1
            number = self.copies
            self.fail(number)
            last = self._read.get(target.data_ptr(), 0)
            assert after.tick >= last, (
                f"copy {number} overwrites a slot that kernel {last} reads, and waits only for {after.tick}"
            )
            if not any(
                start <= source.data_ptr() < start + size for start, size in self.pinned.items()
            ):
                self.unpinned_copies += 1
            self._written[target.data_ptr()] = number
            target.fill_(255)
            copy = TwinCopy(self, number)
            self._queue.put((copy, source, target, self.delay(number), self.spoil(number)))
            return copy

    def download(self, tensor):
        return TwinDownload(self, tensor)

    def upload(self, tensor):
        return tensor.clone()

    def pin(self, memory):
        assert memory.data_ptr() % 4096 == 0
        assert not any(
            start < memory.data_ptr() + memory.nbytes and memory.data_ptr() < start + size
            for start, size in self.pinned.items()
        )
        if len(self.pinned) >= self.pins_allowed:
            return False
        self.pinned[memory.data_ptr()] = memory.nbytes
        return True

    def unpin(self, memory):
        del self.pinned[memory.data_ptr()]

    def memory(self):
        used = self.taken + self.allocated
        return CardMemory(
            self.capacity - used, self.capacity, self.allocated, self.allocated, self.peak
        )

    def release(self):
        self.released += 1

    def synchronize(self):
        pass

    # What its copies and ops tell

    def order(self, number):
        """The compute stream is behind the copy ``number`` now, and so behind all before it."""
        self._ordered = max(self._ordered, number)

    def launch(self, rows):
        """A kernel that reads ``rows``."""
        self.launches += 1
        self.on_launch(self.launches)
        self._tick += 1
        for row in rows:
            number = self._written.get(row.data_ptr(), -1)
            assert number <= self._ordered, (
                f"kernel {self._tick} reads a slot and nobody has waited for copy {number} into it"
            )
            self._read[row.data_ptr()] = self._tick


# The engine on it

PROMPT = "My fellow citizens of the Senate and House of Representatives,"
IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(3)).tolist()
EXPERTS = 7 * 32


def open_on(export, twin, host_slots=EXPERTS, **options):
    """The sample on a twin, with so many experts in RAM below it."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=host_slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "make_plan", plan)
        patch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (twin, "a test"))
        return Runtime.open(export, context=256, threads=1, **options)


def whole(runtime):
    """No slot is lost or used twice, on the card and in RAM, and the card's table says what is
    true."""
    slots, tier = runtime._experts._slots, runtime._store
    table = slots._table
    held = [*table.free, *table.slot_of.values(), *(slot for _, slot in slots._leaving)]
    assert sorted(held) == list(range(len(table.slab)))
    assert {*table.slot_of} == {*slots._coming} | slots.cache._cached
    told = {key: slot for key, slot in enumerate(slots.table_LE.flatten().tolist()) if slot >= 0}
    assert told == {key: table.slot_of[key] for key in slots.cache._cached}
    tier.advance(0)  # gives back what is lent
    deadline = time.monotonic() + 5
    below = tier._table
    while (
        len(below.free) + len(below.slot_of) < len(below.slab) or tier._in_use
    ) and time.monotonic() < deadline:
        time.sleep(0.01)  # a prefetch is still on its way, from the disk or from RAM
        tier.stats()
    assert sorted([*below.free, *below.slot_of.values()]) == list(range(len(below.slab)))
    assert {*below.slot_of} == below.cache._cached
    assert not tier._in_use


def slow(number):
    return 0.0005 * (number % 3)


def measured(**values):
    return Bandwidths().updated("measured on a day", **values)
