"""Where expert records live and how they move: reads from disk, the host tier, and the slots that a step computes from.

    Slots       one slab of records on the fast tier (the GPU's memory; RAM when there is no GPU)
      | read(key, slot, urgency) -> Read
    HostTier    a slab in pinned RAM, only when the fast tier is a GPU's memory (``offload.host``)
      | read(key, slot, urgency) -> Read
    DiskReader  threads with several aligned O_DIRECT reads in flight, the most urgent first

The step never polls: it asks for what it misses, computes what it has, and waits on ``Read``s.  A record counts as
present only when its last byte has arrived and its checksum is right, so an interrupted step leaves nothing half-filled.
An expert is named everywhere by one integer, its key: (index of the MoE layer) * n_routed_experts + expert.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offload.cache import Cache
from offload.device import Card, Copy
from offload.memory import Touching, page_aligned
from offload.plan import HELP_BYTES
from quant.export import Export
from slotmoe import DeviceError, ExportError

DEMAND, WARM = 0, 1 << 30  # urgencies; prefetches lie between them, the number of layers until their use
READERS = 8
PIECE_BYTES = 1 << 20  # records are read in pieces, so that one missing expert too is worth several reads in flight
LAZY_BYTES = 256 << 20  # a slab beyond this gets its pages while the first tokens are made


class Read:
    """One record on its way into memory.  ``done`` is True when it can be used or when ``error`` says why not; on a card it can
    be used by kernels that wait for ``copy`` first."""

    __slots__ = ("after", "buffer", "cancelled", "copy", "done", "error", "key", "outstanding", "started", "taken", "urgency")

    def __init__(self, key: int, buffer: memoryview, urgency: int, after: Callable[[bool], None] | None = None):
        # ``after(arrived)`` runs once in the reading thread, before ``done``: False if the read failed or was given up.
        self.key, self.buffer, self.urgency, self.after = key, buffer, urgency, after
        self.taken = self.outstanding = 0  # bytes given to readers, pieces being read
        self.started = self.done = self.cancelled = False
        self.error: BaseException | None = None
        self.copy: Copy | None = None


class DiskReader:
    """The disk tier: ``READERS`` threads that read records piece by piece, the most urgent record first.

    Reads bypass the page cache where the file system allows (``direct``).  A record that fails to arrive or has a wrong
    checksum is read once more; then its ``Read`` carries an ``ExportError``.
    """

    def __init__(self, export: Export, direct: bool, threads: int = READERS):
        self._export, self.record_bytes = export, export.layout.record_bytes
        self.direct = direct and export.bypass_page_cache()
        if direct and not self.direct:
            logging.getLogger("slotmoe").warning("%s: this file system refuses O_DIRECT; reads go through the page cache", export.folder)
        self._lock = threading.Lock()
        self._work, self._arrived = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Read]] = []
        self._order = count()
        self._helps = self.record_bytes <= HELP_BYTES
        self._piece = min(PIECE_BYTES, -(-self.record_bytes // 4096) * 4096)
        self._closing = False
        self._busy, self._busy_since = 0, 0.0
        self.bytes_read, self.busy_seconds, self.retries = 0, 0.0, 0
        self._threads = [threading.Thread(target=self._run, name=f"slotmoe-read-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def read(self, key: int, target: Tensor, urgency: int) -> Read:
        """A read of one record into ``target``, uint8 [record_bytes] in RAM; ``submit`` starts it."""
        return Read(key, target.numpy().data, urgency)

    def submit(self, reads: Iterable[Read]) -> None:
        """Queue reads; those of urgency ``DEMAND`` overtake all others."""
        with self._lock:
            for read in reads:
                heapq.heappush(self._queue, (read.urgency, next(self._order), read))
                if not (self._helps and read.urgency == DEMAND):
                    self._work.notify(max(1, self.record_bytes // self._piece))

    def hasten(self, read: Read) -> None:
        """A prefetch has become a demand."""
        with self._lock:
            if read.urgency != DEMAND and not read.done:
                read.urgency = DEMAND
                heapq.heappush(self._queue, (DEMAND, next(self._order), read))  # the old entry is skipped when it comes up

    def cancel(self, read: Read) -> bool:
        """Give a read up; True if its buffer is free now, False if a piece of it is still arriving (wait for ``done``)."""
        with self._lock:
            read.cancelled = True
            if not read.done and (not read.started or (read.outstanding == 0 and read.taken < len(read.buffer))):
                if read.after is not None:
                    read.after(False)
                read.done = True
            return read.done

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until at least one of ``reads`` is done, and return those that are."""
        while True:
            with self._lock:
                if finished := [read for read in reads if read.done]:
                    return finished
                piece = self._take() if self._helps else None
                if piece is None:
                    self._arrived.wait()
                    continue
            self._read(*piece)

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins; a disk remembers nothing."""

    def bandwidth(self) -> float:
        """Bytes a second while reads were in flight, so far; 1 GB/s until something was read."""
        with self._lock:
            busy = self.busy_seconds + (time.perf_counter() - self._busy_since if self._busy else 0.0)
            return self.bytes_read / busy if self.bytes_read and busy else 1e9

    def stats(self) -> dict[str, Any]:
        """``disk``: bytes, seconds with reads in flight, records read a second time, and whether the page cache is bypassed."""
        counts = {"bytes": self.bytes_read, "seconds": self.busy_seconds, "retries": self.retries, "direct": self.direct}
        return {"disk": counts}

    def close(self) -> None:
        """Stop the threads after the pieces that they are reading; what is queued is given up."""
        with self._lock:
            self._closing = True
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while (piece := self._take()) is None:
                    if self._closing:
                        return
                    self._work.wait()
            self._read(*piece)

    def _take(self) -> tuple[Read, int, int] | None:
        """The next piece to read, (read, start, stop) in bytes of the record; the lock is held."""
        while self._queue:
            urgency, _, read = self._queue[0]
            total = len(read.buffer)
            if read.done or read.cancelled or urgency != read.urgency or (read.started and read.taken >= total):
                heapq.heappop(self._queue)
                continue
            start, read.taken = read.taken, min(read.taken + self._piece, total)
            read.started = True
            read.outstanding += 1
            if read.taken >= total:
                heapq.heappop(self._queue)
            if self._busy == 0:
                self._busy_since = time.perf_counter()
            self._busy += 1
            return read, start, read.taken
        return None

    def _read(self, read: Read, start: int, stop: int) -> None:
        problem: BaseException | None = None
        try:
            if stop > start:
                self._export.read_range(*self._place(read.key), start, read.buffer[start:stop])
        except BaseException as raised:  # also Ctrl-C in a thread that helps: others may wait for this read
            problem = raised
        with self._lock:
            self.bytes_read += stop - start
            read.outstanding -= 1
            read.error = read.error or problem
            if read.error is not None:
                read.taken = len(read.buffer)  # no use in reading the rest
            last = read.outstanding == 0 and (read.taken >= len(read.buffer) or read.cancelled)
        if last:
            try:
                self._finish(read)
            except BaseException as raised:
                problem = read.error = raised
        with self._lock:
            self._busy -= 1
            if self._busy == 0:
                self.busy_seconds += time.perf_counter() - self._busy_since
            if last:
                read.done = True
                self._arrived.notify_all()
        if problem is not None and not isinstance(problem, Exception):
            raise problem

    def _place(self, key: int) -> tuple[int, int]:
        row, expert = divmod(key, self._export.experts)
        return self._export.layers[row], expert

    def _finish(self, read: Read) -> None:
        """Verify a record whose pieces are all there, reading it once more if something is wrong, and hand it on."""
        arrived = False
        try:
            if not read.cancelled and not isinstance(read.error, KeyboardInterrupt):
                self._verify(read)
                arrived = True
        finally:
            if read.after is not None:
                read.after(arrived)

    def _verify(self, read: Read) -> None:
        layer, expert = self._place(read.key)
        if read.error is None:
            try:
                if read.buffer:
                    self._export.verify_record(layer, expert, read.buffer)
                return
            except ExportError:
                pass
        read.error = None
        self.retries += 1
        self._export.read_range(layer, expert, 0, read.buffer)
        self._export.verify_record(layer, expert, read.buffer)


class Source(Protocol):
    """Where ``Slots`` gets records from: ``DiskReader`` or ``HostTier``."""

    def read(self, key: int, target: Tensor, urgency: int) -> Read: ...

    def submit(self, reads: Iterable[Read]) -> None: ...

    def hasten(self, read: Read) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def cancel(self, read: Read) -> bool: ...

    def wait(self, reads: Collection[Read]) -> list[Read]: ...

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Table:
    """A slab [slots + transit, record_bytes] and which key is in which slot.

    ``cache`` decides which keys stay, at most ``cache.slots`` of them; the other ``transit`` slots hold records on their
    way in, so that nothing has to leave before its successor is there, and a wrong prefetch costs no cached expert.
    """

    def __init__(self, cache: Cache, slab: Tensor):
        self.cache, self.slab = cache, slab
        self.slot_of: dict[int, int] = {}
        self.free = list(range(len(slab) - 1, -1, -1))

    def settle(self, key: int, keep: Collection[int]) -> int | None:
        """``key`` was used and is not cached: let the cache admit it in place of another, or free its slot.  Who left, if any."""
        leaving = self.cache.offer(key, keep)
        if leaving is not None:
            self.free.append(self.slot_of.pop(leaving))
        return leaving


class Slots:
    """Expert slots of the fast tier, [cache.slots + transit, record_bytes] in RAM or on ``card``; ``reserve`` of the transit
    slots are for demands alone, at least as many as one token's experts of a layer.

    ``table_LE``, int32 [layers, E] on the device, says which slot a cached expert is in, and -1 of the others.

    In RAM a large slab grows: it begins with a few slots, and a thread gets the pages of the others (``Touching``)."""

    def __init__(self, source: Source, cache: Cache, transit: int, reserve: int, record_bytes: int, card: Card | None = None):
        total = min(cache.slots + transit, cache.layers * cache.experts)
        if card is None:
            slab = page_aligned(total * record_bytes).view(total, record_bytes)
        else:
            slab = card.empty((total, record_bytes), torch.uint8)
        self._source, self._table, self.cache = source, Table(cache, slab), cache
        self._records = slab.unbind()  # made once: a decode step takes six a layer
        self._slots = np.full((cache.layers, cache.experts), -1, np.int32)
        self.table_LE = torch.from_numpy(self._slots)
        self.transit, self._reserve, self._card = transit, reserve, card
        self._coming: OrderedDict[int, Read] = OrderedDict()  # keys in transit slots, oldest first
        self._leaving: list[tuple[Read, int]] = []  # given up, but a piece is still arriving in the slot
        self.wait_seconds = 0.0
        self.planned, self._touching, self._touched = cache.slots, None, 0
        first = max(transit + reserve, LAZY_BYTES // record_bytes)
        if card is None and first < total:
            self._table.free, cache.slots = self._table.free[-first:], first - transit
            self._touching = Touching(slab.view(-1), first * record_bytes)

    def memory(self) -> Tensor:
        """All slots as one, uint8, with all its pages."""
        self._finish_growing()
        return self._table.slab.view(-1)

    def _finish_growing(self) -> None:
        if self._touching is not None:
            self._touching.finish()
            self._grow()

    def _grow(self) -> None:
        """Take over the slots whose pages are there now."""
        if self._touching is None:
            return
        slab, cache = self._table.slab, self.cache
        known = cache.slots + self.transit
        ready = self._touching.ready // slab.shape[1]
        self._table.free[:0] = range(known, ready)
        cache.slots = ready - self.transit
        if ready == len(slab):
            cache.slots, self._touching, self._touched = self.planned, None, slab.nbytes

    def __contains__(self, key: int) -> bool:
        """Whether ``key`` is here or on its way."""
        return key in self._table.slot_of

    @property
    def slab(self) -> Tensor:
        """All slots, uint8 [slots, record_bytes] on the device."""
        return self._table.slab

    def slot(self, key: int) -> int:
        """The row of the slab with the record of ``key``, which is cached or whose read is done."""
        return self._table.slot_of[key]

    def record(self, key: int) -> Tensor:
        """The record of ``key``, which is cached or whose read is done: uint8 [record_bytes] on the device."""
        return self._records[self._table.slot_of[key]]

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins.  What an interrupted one has left in transit is given up; the cache takes
        what has arrived to warm it."""
        for key in [key for key, read in self._coming.items() if read.urgency != WARM]:
            self.drop(key)
        self.adopt()
        self.cache.advance(tokens)
        self._source.advance(tokens)

    def demand(self, keys: Collection[int], keep: Collection[int]) -> list[Read]:
        """Reads of ``keys``, none of them cached, ahead of all prefetches; what is in ``keep`` stays.  At most ``transit``."""
        reads, new = [], []
        for key in keys:
            read = self._coming.get(key)
            if read is not None and read.error is not None:  # a prefetch that failed: now it matters, so try again
                self.drop(key)
                read = None
            if read is None:
                read = self._begin(key, DEMAND, keep)
                new.append(read)
            elif not read.done:
                self._source.hasten(read)
            reads.append(read)
        self._source.submit(new)
        return reads

    def prefetch(self, key: int, urgency: int) -> bool:
        """Start reading ``key`` unless that would leave fewer than ``reserve`` transit slots free."""
        self._collect()
        if len(self._coming) + len(self._leaving) + self._reserve >= self.transit:
            return False
        self._source.submit([self._begin(key, urgency, ())])
        return True

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until some of ``reads`` are done and return them; on a card the kernels launched from now on wait for their
        copies.  Raises what made one fail; its slot is free then."""
        started = time.perf_counter()
        finished = self._source.wait(reads)
        self.wait_seconds += time.perf_counter() - started
        for read in finished:
            if read.copy is not None and self._card is not None and read.error is None:
                try:
                    self._card.wait(read.copy)
                except RuntimeError as problem:
                    read.error = DeviceError(f"copying an expert to {self._card.name} failed ({problem})")
            if read.error is not None:
                self.drop(read.key)
                raise read.error
        return finished

    def settle(self, key: int, keep: Collection[int]) -> None:
        """``key``, in transit, has been used: the cache keeps it or lets it go.  ``keep`` is not evicted for it."""
        self._grow()
        del self._coming[key]
        leaving = self._table.settle(key, keep)
        if leaving != key:
            self._entered(key, leaving)

    def _entered(self, key: int, leaving: int | None) -> None:
        """``key`` is cached now, in place of ``leaving``."""
        if leaving is not None:
            self._slots.flat[leaving] = -1
        self._slots.flat[key] = self._table.slot_of[key]

    def rebuild(self) -> None:
        """Make the table what it has to be: a step that was interrupted may have changed only one of the two."""
        self._slots.fill(-1)
        for key, slot in self._table.slot_of.items():
            if key in self.cache:
                self._slots.flat[key] = slot

    def drop(self, key: int) -> None:
        """Give up a key in transit, arrived or not; nothing happens if it is not there."""
        if key not in self._coming:
            return
        read, slot = self._coming.pop(key), self._table.slot_of.pop(key)
        if read.done or self._source.cancel(read):
            self._table.free.append(slot)
        else:
            self._leaving.append((read, slot))

    def present(self) -> tuple[int, int]:
        """Bytes of cached records, and bytes of the slab that have their pages by now; for another thread to ask now and then."""
        size, touching = self._table.slab.shape[1], self._touching
        used = (len(self.cache) + len(self._coming) + len(self._leaving)) * size
        if touching is not None:  # its pages, and those of the first slots that are in use
            used = touching.ready - touching.start + min(used, touching.start)
        self._touched = max(self._touched, used)  # pages never go
        return len(self.cache) * size, self._touched

    def room(self) -> int:
        """Slots of the cache that are free now."""
        self._grow()
        return self.cache.slots - len(self.cache)

    @property
    def full(self) -> bool:
        """Whether nothing is free and nothing will grow."""
        return len(self.cache) == self.planned

    def adopt(self) -> None:
        """Let the cache keep what was read to warm it and has arrived, as long as it has room."""
        self._grow()
        for key in [key for key, read in self._coming.items() if read.urgency == WARM and _arrived(read)]:
            if len(self.cache) < self.cache.slots and self._coming[key].error is None:
                del self._coming[key]
                self.cache.add(key)
                self._entered(key, None)
            else:
                self.drop(key)

    def fill(self, keys: Iterable[int], done: Callable[[], None]) -> None:
        """Read uncached ``keys`` into the cache's free room, several at a time, and wait; ``done()`` after each."""
        self._finish_growing()
        pending: list[Read] = []
        room = self.room()
        for key in keys:
            if room == 0:
                break
            if key in self:
                continue
            room -= 1
            pending.append(self.demand([key], [read.key for read in pending])[0])
            while len(pending) == self.transit:
                self._keep_finished(pending, done)
        while pending:
            self._keep_finished(pending, done)

    def _keep_finished(self, pending: list[Read], done: Callable[[], None]) -> None:
        for read in self.wait(pending):
            pending.remove(read)
            del self._coming[read.key]
            self.cache.add(read.key)
            self._entered(read.key, None)
            done()

    def _begin(self, key: int, urgency: int, keep: Collection[int]) -> Read:
        slot = self._acquire(keep)
        try:
            read = self._source.read(key, self._table.slab[slot], urgency)
        except BaseException:
            self._table.free.append(slot)
            raise
        self._table.slot_of[key] = slot
        self._coming[key] = read
        return read

    def _acquire(self, keep: Collection[int]) -> int:
        """A free slot; the oldest prefetch that nobody wants now gives its own up if there is none."""
        self._collect()
        while not self._table.free:
            unwanted = next((key for key in self._coming if key not in keep), None)
            if unwanted is not None:
                self.drop(unwanted)
            else:
                self._source.wait([read for read, _ in self._leaving])
            self._collect()
        return self._table.free.pop()

    def close(self) -> None:
        """Stop what still goes on in other threads; the source is closed by itself."""
        if self._touching is not None:
            self._touching.close()

    def _collect(self) -> None:
        if self._leaving:
            self._table.free += [slot for read, slot in self._leaving if read.done]
            self._leaving = [(read, slot) for read, slot in self._leaving if not read.done]


def _arrived(read: Read) -> bool:
    """Whether a read is done, on a card its copy too."""
    return read.done and (read.copy is None or read.copy.done())
