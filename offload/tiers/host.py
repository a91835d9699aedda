"""The host tier: experts in RAM between the disk and a GPU's slots.

A record comes from the disk into a slot here and goes on from there, on the GPU's stream of copies,
as soon as its last byte has arrived; no thread waits for the copy.  The slot can take another
record when the copy is done, which is checked when a slot is needed.  A record can also be
*acquired*: it stays here, and the CPU computes with it.

RAM is page-locked piece by piece, each when all its records have been written: a first token need
not wait for all of it, and no page is locked before it exists.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from slotmoe.errors import DeviceError
from slotmoe.jsonfile import Json
from slotmoe.offload.plan.memory import LENT
from slotmoe.offload.policy.cache import Cache
from slotmoe.offload.tiers.device import Device, Event
from slotmoe.offload.tiers.disk import DEMAND, DiskReader, Read, unlock
from slotmoe.offload.tiers.pages import page_aligned
from slotmoe.offload.tiers.slots import Table
from slotmoe.quant.export.reader import Export

PIN_BYTES = 64 << 20
_NOTHING = memoryview(b"")


class _Use(NamedTuple):
    """A record of the slab that is being written, copied or computed with: it is ``present`` if it
    need not be written, and ``cached`` if the cache had it before."""

    expert_id: int
    slot: int
    present: bool
    cached: bool


class HostTier(DiskReader):
    """A disk reader with experts in RAM under a cache of their own, [cache.slots + staging,
    record_bytes].  ``staging`` slots hold what is on its way; at most so many reads may be under
    way or acquired at once.  A ``Read`` is done when its copy has been queued."""

    def __init__(self, export: Export, direct: bool, cache: Cache, staging: int, device: Device):
        size, count = export.layout.record_bytes, cache.slots + staging
        self.slab = page_aligned(count * size, forks=False).view(-1, size)
        self.table, self.cache, self._device = Table(cache, self.slab), cache, device
        self._table_lock = threading.RLock()
        self._in_use = Counter[int]()  # uses of cached experts
        self._copying: deque[tuple[Event, _Use]] = deque()  # in their order
        self._acquired: dict[Read, _Use] = {}
        self._unnoted: list[int] = []  # uses that the cache has not heard of
        self._pinned = _Pinning(self.slab, device)
        self.bytes_copied, self.copy_seconds, self.bytes_acquired = 0, 0.0, 0
        super().__init__(export, direct)

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read:
        """A read of one record into ``target`` on the GPU: from RAM if it is there, and then queued
        already, else from disk through RAM."""
        after = self._device.record()  # the slot's last readers have been launched
        use = self._claim(expert_id)
        self._unnoted.append(expert_id)
        if use.present:
            read = Read(expert_id, _NOTHING, urgency)
            self._forward(read, use, target, after, True)
            read.done = True
        else:
            read = Read(expert_id, self._buffer(use), urgency)
            # What stays in a read must not keep it: this does, until it has been called.
            read.after = partial(self._forward, read, use, target, after)
        return read

    def submit(self, reads: Iterable[Read]) -> None:
        """See ``DiskReader``.  The cache hears of the uses: their copies have been queued, which
        were not to wait for that."""
        super().submit(reads)
        with self._table_lock:
            self._collect()
            while self._unnoted:
                self.cache.use(self._unnoted.pop(0))

    def acquire(self, expert_id: int) -> Read:
        """A read of one record into RAM alone, ahead of all prefetches; ``submit`` starts it, and
        ``release`` ends its use."""
        use = self._claim(expert_id)

        def arrived(ok: bool) -> None:
            if ok:
                self._pinned.written(use.slot)

        buffer = _NOTHING if use.present else self._buffer(use)
        read = Read(expert_id, buffer, DEMAND, arrived, done=use.present)
        self._acquired[read] = use
        self._unnoted.append(expert_id)
        return read

    def slot(self, read: Read) -> int:
        """The row of the slab with the record of an acquired read that is done."""
        return self._acquired[read].slot

    def release(self, read: Read) -> None:
        """The record of an acquired read that is done has been used, or is not wanted any more."""
        arrived = read.error is None and not read.cancelled
        with self._table_lock:
            self.bytes_acquired += self.record_bytes if arrived else 0
            self._put_back(self._acquired.pop(read), arrived)

    def advance(self, tokens: int) -> None:
        """A pass over more tokens begins."""
        with self._table_lock:
            self._collect()
            self.cache.advance(tokens)

    def abandon(self) -> None:
        """See ``DiskReader``; nothing is copied or acquired any more either, and no slot is
        lost."""
        unlock(self._table_lock)  # before the threads are waited for, which may want them
        unlock(self._pinned.lock)
        super().abandon()
        self._device.drain()
        with self._table_lock:
            self._copying.clear()
            self._in_use.clear()
            self._acquired.clear()
            self._unnoted.clear()
            self.table.restore(range(len(self.slab)))

    def fill(self, expert_ids: Iterable[int], done: Callable[[], None]) -> None:
        """Read experts that are not cached into free room, and wait; ``done()`` after each."""
        absent = [id for id in expert_ids if id not in self.cache]
        room, computed = self.cache.slots - len(self.cache), self.bytes_acquired

        def begin(expert_id: int) -> Read:
            read = self.acquire(expert_id)
            self.submit([read])
            return read

        for read in self.read_each(absent[:room], LENT, begin):
            self.release(read)
            if read.error is not None:
                raise read.error
            done()
        self.bytes_acquired = computed

    def bandwidth(self) -> float:
        """Bytes a second at which records come, by what share of them was in RAM so far."""
        lookups = self.cache.hits + self.cache.misses
        from_disk = self.cache.misses / lookups if lookups else 1.0
        link = self.copy_seconds / self.bytes_copied if self.bytes_copied else 0.0
        return 1 / (from_disk / super().bandwidth() + link + 1e-12)

    def stats(self) -> Json:
        """Those of the disk, and ``host``: bytes copied to the GPU and seconds that copies took,
        bytes of records that the CPU computed with, hits and misses in RAM, and whether it is
        page-locked as far as it is filled."""
        with self._table_lock:
            self._collect()
        counts = {"bytes": self.bytes_copied, "seconds": self.copy_seconds}
        counts |= {"lent_bytes": self.bytes_acquired, "pinned": not self._pinned.refused}
        counts |= {"hits": self.cache.hits, "misses": self.cache.misses}
        return {**super().stats(), "host": counts}

    def close(self) -> None:
        """Stop reading, wait for what is being copied, give the RAM back."""
        unlock(self._table_lock)
        unlock(self._pinned.lock)
        super().close()
        for copy, _ in self._copying:
            copy.synchronize()
        self._pinned.close()

    def _buffer(self, use: _Use) -> memoryview:
        """Where the disk writes a record."""
        return self.table.records[use.slot].numpy().data

    def _claim(self, expert_id: int) -> _Use:
        """A use of a cached expert, or of a free slot, in which it may be still."""
        with self._table_lock:
            if expert_id not in self.cache.cached:
                self._collect()
            if expert_id in self.cache.cached:
                self._in_use[expert_id] += 1
                return _Use(expert_id, self.table.slot_of[expert_id], True, cached=True)
            # All that is on its way has been queued: the oldest copy makes room.
            while not (self.table.free or self.table.left):
                self._copying[0][0].synchronize()
                self._collect()
            return _Use(expert_id, *self.table.acquire(expert_id), cached=False)

    def _forward(self, read: Read, use: _Use, target: Tensor, after: Event, arrived: bool) -> None:
        """Queue the copy of a record that has arrived in RAM."""
        try:
            if arrived:
                self._pinned.written(use.slot)
                with self._table_lock:  # so that the time of a copy holds no part of another
                    self._copy(read, self.table.records[use.slot], target, after)
        finally:
            with self._table_lock:
                if read.copy is not None:
                    self._copying.append((read.copy, use))
                else:
                    self._put_back(use, arrived=False)

    def _copy(self, read: Read, record: Tensor, target: Tensor, after: Event) -> None:
        try:
            read.copy = self._device.copy(record, target, after)
        except RuntimeError as problem:
            name = self._device.name
            read.error = DeviceError(f"copying an expert to {name} failed ({problem})")

    def _collect(self) -> None:
        """Give the slots of copies that are done to the cache; the lock is held."""
        while self._copying and self._copying[0][0].done():
            copy, use = self._copying.popleft()
            self.bytes_copied += self.record_bytes
            self.copy_seconds += copy.seconds
            self._put_back(use, arrived=True)

    def _put_back(self, use: _Use, arrived: bool) -> None:
        if use.cached:
            self._in_use[use.expert_id] -= 1
            if self._in_use[use.expert_id] == 0:
                del self._in_use[use.expert_id]
        elif not arrived or use.expert_id in self.cache:  # the record was read twice at once
            self.table.free.append(use.slot)
        else:
            self.table.slot_of[use.expert_id] = use.slot
            self.table.admit(use.expert_id, pinned=self._in_use)
            if len(self.cache) == self.cache.slots:
                self._pinned.rest()


class _Pinning:
    """Page-locks a slab in pieces of ``PIN_BYTES``, each when all its records have been written
    once."""

    def __init__(self, slab: Tensor, device: Device):
        self._device, self.lock = device, threading.RLock()
        self._count = max(1, PIN_BYTES // slab.shape[1])
        self._pieces = slab.split(self._count)
        # The slots that nothing has been written to, of each piece that is not locked.
        self._unwritten = {
            piece: set(range(piece * self._count, piece * self._count + len(records)))
            for piece, records in enumerate(self._pieces)
        }
        self._locked: list[Tensor] = []
        self.refused = False

    def written(self, slot: int) -> None:
        """A record has arrived in ``slot``."""
        piece = slot // self._count
        if piece not in self._unwritten:
            return
        with self.lock:
            slots = self._unwritten.get(piece, {slot})
            slots.discard(slot)
            if not slots:
                self._pin(piece)

    def rest(self) -> None:
        """Nothing more will be written to slots that are free now: lock what is left."""
        if self._unwritten:
            with self.lock:
                for piece in list(self._unwritten):
                    self._pin(piece)

    def _pin(self, piece: int) -> None:
        if self._unwritten.pop(piece, None) is None or self.refused:
            return
        self._locked.append(self._pieces[piece])  # first, so that no locked piece is forgotten
        if self._device.pin(self._pieces[piece]):
            return
        self._locked.pop()
        self.refused = True
        logging.getLogger("slotmoe").warning(
            "the system locks no more RAM for %s; copies from it are slower", self._device.name
        )

    def close(self) -> None:
        while self._locked:
            self._device.unpin(self._locked.pop())
