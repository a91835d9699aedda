"""The host tier: experts in RAM between the disk and a GPU's slots.

A record comes from the disk into a slot here and goes on from there, on the GPU's stream of copies,
as soon as its last byte has arrived; no thread waits for the copy.  The slot can take another
record when the copy is done, which is checked when a slot is needed.  A record can also be
*acquired*: it stays here, and the CPU computes with it.

RAM is page-locked piece by piece, each when all its records have been written: a first token need
not wait for all of it, and no page is locked before it exists.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from slotmoe.errors import DeviceError
from slotmoe.offload.plan.memory import LENT
from slotmoe.offload.policy.cache import Cache
from slotmoe.offload.tiers.device import Copy, Device, Event
from slotmoe.offload.tiers.disk import DEMAND, DiskReader, Read
from slotmoe.offload.tiers.memory import page_aligned
from slotmoe.offload.tiers.slots import Table

PIN_BYTES = 64 << 20


class HostTier:
    """Experts in RAM under a cache of their own, [cache.slots + staging, record_bytes].
    ``staging`` slots hold what is on its way; at most so many reads may be under way or acquired at
    once.  A ``Read`` is done when its copy has been queued."""

    def __init__(self, disk: DiskReader, cache: Cache, staging: int, device: Device):
        size, count = disk.record_bytes, cache.slots + staging
        self.slab = page_aligned(count * size).view(-1, size)
        self._disk, self._device, self._lock = disk, device, threading.Lock()
        self.table = Table(cache, self.slab)
        # Cached expert ids that are being copied or acquired, and how often.
        self._in_use = dict[int, int]()
        # Copies in their order, with expert id, slot, and whether it was cached.
        self._copying: deque[tuple[Copy, int, int, bool]] = deque()
        self._acquired: dict[Read, tuple[int, bool]] = {}  # slot, cached
        self._pinned = _Pinning(self.slab, device)
        self.bytes_copied, self.copy_seconds, self.bytes_acquired = 0, 0.0, 0
        self.submit, self.promote = disk.submit, disk.promote
        self.cancel, self.wait = disk.cancel, disk.wait

    def __contains__(self, expert_id: int) -> bool:
        """Whether the expert is cached in RAM."""
        return expert_id in self.table.cache

    @property
    def cache(self) -> Cache:
        return self.table.cache

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read:
        """A read of one record into ``target`` on the GPU: from RAM if it is there, and then queued
        already, else from disk through RAM."""
        after = self._device.record()  # the slot's last readers have been launched
        slot, cached = self._claim(expert_id)

        def arrived(ok: bool) -> None:
            try:
                if ok:
                    self._pinned.written(slot)
                    self._copy(read, self.slab[slot], target, after)
            finally:
                with self._lock:
                    if read.copy is not None:
                        self._copying.append((read.copy, expert_id, slot, cached))
                    else:
                        self._put_back(expert_id, slot, cached, arrived=False)

        read = Read(expert_id, self._buffer(slot, cached), urgency, arrived)
        if cached:
            arrived(True)
            read.done = True
        return read

    def acquire(self, expert_id: int) -> Read:
        """A read of one record into RAM alone, ahead of all prefetches; ``submit`` starts it, and
        ``release`` ends its use."""
        slot, cached = self._claim(expert_id)

        def arrived(ok: bool) -> None:
            if ok:
                self._pinned.written(slot)
                return
            with self._lock:
                if self._acquired.pop(read, None) is not None:
                    self._put_back(expert_id, slot, cached, arrived=False)

        read = Read(expert_id, self._buffer(slot, cached), DEMAND, arrived)
        read.done = cached
        self._acquired[read] = slot, cached
        return read

    def slot(self, read: Read) -> int:
        """The row of the slab with the record of an acquired read that is done."""
        return self._acquired[read][0]

    def release(self, read: Read) -> None:
        """The record of an acquired read that is done has been used, or is not wanted any more."""
        with self._lock:
            if (acquired := self._acquired.pop(read, None)) is not None:
                self.bytes_acquired += self._disk.record_bytes
                self._put_back(read.expert_id, *acquired, arrived=read.error is None)

    def advance(self, tokens: int) -> None:
        """A pass over more tokens begins; what an interrupted one has acquired is released."""
        for read in list(self._acquired):
            if not read.done and not self._disk.cancel(read):
                self._disk.wait([read])
            self.release(read)
        with self._lock:
            self._collect()
            self.cache.advance(tokens)

    def fill(self, expert_ids: Iterable[int]) -> None:
        """Read experts that are not cached into free room, and wait."""
        pending: list[Read] = []
        room = self.cache.slots - len(self.cache)
        for expert_id in (id for id in expert_ids if id not in self.cache):
            if room <= 0:
                break
            room -= 1
            pending.append(self.acquire(expert_id))
            self.submit(pending[-1:])
            if len(pending) == LENT:
                self._finish(pending)
        while pending:
            self._finish(pending)

    def _finish(self, pending: list[Read]) -> None:
        for read in self.wait(pending):
            pending.remove(read)
            self.release(read)
            self.bytes_acquired -= self._disk.record_bytes
            if read.error is not None:
                raise read.error

    def bandwidth(self) -> float:
        """Bytes a second at which records come, by what share of them was in RAM so far."""
        lookups = self.cache.hits + self.cache.misses
        from_disk = self.cache.misses / lookups if lookups else 1.0
        link = self.copy_seconds / self.bytes_copied if self.bytes_copied else 0.0
        return 1 / (from_disk / self._disk.bandwidth() + link + 1e-12)

    def stats(self) -> dict[str, Any]:
        """Those of the disk, and ``host``: bytes copied to the GPU and seconds that copies took,
        bytes of records that the CPU computed with, hits and misses in RAM, and whether it is
        page-locked as far as it is filled."""
        with self._lock:
            self._collect()
        counts = {"bytes": self.bytes_copied, "seconds": self.copy_seconds}
        counts |= {"lent_bytes": self.bytes_acquired, "pinned": not self._pinned.refused}
        counts |= {"hits": self.cache.hits, "misses": self.cache.misses}
        return {**self._disk.stats(), "host": counts}

    def close(self) -> None:
        """Stop reading, wait for what is being copied, give the RAM back."""
        self._disk.close()
        for copy, *_ in self._copying:
            copy.synchronize()
        self._pinned.close()

    @property
    def idle(self) -> bool:
        """Whether no record is on its way, being copied or acquired."""
        with self._lock:
            self._collect()
            busy = len(self.table.free) + len(self.table.slot_of) < len(self.slab)
            return not busy and not self._in_use

    def _buffer(self, slot: int, cached: bool) -> memoryview:
        """Where the disk writes a record; nothing where it is cached."""
        return memoryview(b"") if cached else self.slab[slot].numpy().data

    def _claim(self, expert_id: int) -> tuple[int, bool]:
        """The slot of a cached expert and True, or a free one and False."""
        with self._lock:
            self._collect()
            if self.cache.use(expert_id):
                self._in_use[expert_id] = self._in_use.get(expert_id, 0) + 1
                return self.table.slot_of[expert_id], True
            # All that is on its way has been queued: the oldest copy makes room.
            while not self.table.free:
                self._copying[0][0].synchronize()
                self._collect()
            return self.table.free.pop(), False

    def _copy(self, read: Read, record: Tensor, target: Tensor, after: Event) -> None:
        try:
            read.copy = self._device.copy(record, target, after)
        except RuntimeError as problem:
            name = self._device.name
            read.error = DeviceError(f"copying an expert to {name} failed ({problem})")

    def _collect(self) -> None:
        """Give the slots of copies that are done to the cache; the lock is held."""
        while self._copying and self._copying[0][0].done():
            copy, expert_id, slot, cached = self._copying.popleft()
            self.bytes_copied += self._disk.record_bytes
            self.copy_seconds += copy.seconds
            self._put_back(expert_id, slot, cached, arrived=True)

    def _put_back(self, expert_id: int, slot: int, cached: bool, arrived: bool) -> None:
        if cached:
            self._in_use[expert_id] -= 1
            if self._in_use[expert_id] == 0:
                del self._in_use[expert_id]
        elif not arrived or expert_id in self.cache:  # cached: the record was read twice at once
            self.table.free.append(slot)
        else:
            self.table.slot_of[expert_id] = slot
            self.table.admit(expert_id, pinned=self._in_use)
            if len(self.cache) == self.cache.slots:
                self._pinned.rest()


class _Pinning:
    """Page-locks a slab in pieces of ``PIN_BYTES``, each when all its records have been written
    once."""

    def __init__(self, slab: Tensor, device: Device):
        self._slab, self._device, self._lock = slab, device, threading.Lock()
        self._count = max(1, PIN_BYTES // slab.shape[1])
        starts = range(0, len(slab), self._count)
        self._missing = [set(range(at, min(at + self._count, len(slab)))) for at in starts]
        self._locked: set[int] = set()
        self.refused = False

    def written(self, slot: int) -> None:
        """A record has arrived in ``slot``."""
        piece = slot // self._count
        if piece in self._locked:
            return
        with self._lock:
            self._missing[piece].discard(slot)
            if not self._missing[piece]:
                self._pin(piece)

    def rest(self) -> None:
        """Nothing more will be written to slots that are free now: lock what is left."""
        if len(self._locked) < len(self._missing):
            with self._lock:
                for piece in range(len(self._missing)):
                    self._pin(piece)

    def _pin(self, piece: int) -> None:
        if piece in self._locked or self.refused:
            return
        if self._device.pin(self._piece(piece)):
            self._locked.add(piece)
            return
        self.refused = True
        logging.getLogger("slotmoe").warning(
            "the system locks no more RAM for %s; copies from it are slower", self._device.name
        )

    def _piece(self, piece: int) -> Tensor:
        return self._slab[piece * self._count : (piece + 1) * self._count]

    def close(self) -> None:
        for piece in self._locked:
            self._device.unpin(self._piece(piece))
