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
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

import numpy as np

from slotmoe.errors import DeviceError
from slotmoe.jsonfile import Json
from slotmoe.offload.devices.device import Device, Event, Region
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.experts.disk import DiskReader
from slotmoe.offload.experts.store import (
    ARRIVED,
    CACHED,
    DEMAND,
    FILL,
    FREE,
    LEAVING,
    READING,
    ExpertStore,
    Read,
    Slot,
)
from slotmoe.offload.plan.memory import LENT
from slotmoe.offload.policy.cache import Cache
from slotmoe.quant.export.reader import Export
from slotmoe.sizes import format_size

PIN_BYTES = 64 << 20
SAID_BYTES = 1 << 30  # from which on it is said how long it takes to lock them


class HostTier:
    """In place of a ``DiskReader``, with experts in RAM under a cache of their own: an
    ``ExpertStore`` whose records come from one.  ``staging`` slots hold what is on its way; at most
    so many reads may be under way or acquired at once.  A ``Read`` is done when its copy has been
    queued.

    A record that is in use is staged, or has a reference where it is cached.  The disk's threads
    say what has arrived, so all changes are under a lock; the disk's own is never asked for inside.
    """

    def __init__(self, export: Export, direct: bool, cache: Cache, staging: int, device: Device):
        size, count = export.layout.record_bytes, cache.slots + staging
        nodes, at_once = device.placement.nodes, max(1, PIN_BYTES // size) * size
        self.slab = Region.of(page_aligned(count * size, forks=False, nodes=nodes))
        pieces = map(device.reach, self.slab.split(at_once))
        records = [record for piece in pieces for record in piece.split(size)]
        self.store, self.cache = ExpertStore(cache, records, count), cache
        self._device, self._lock = device, threading.Lock()
        self._copying: deque[tuple[Event, Slot]] = deque()  # in their order
        self.acquired: dict[Read, Slot] = {}
        self._filling = list[Read]()
        self._uses = list[int]()  # that the cache has not heard of
        self.pinned = Pinning(self.slab, size, device)
        self.bytes_copied, self.copy_seconds, self.bytes_acquired = 0, 0.0, 0
        self._disk = disk = DiskReader(export, direct)
        self.promote, self.cancel = disk.promote, disk.cancel
        self.wait, self.stop = disk.wait, disk.stop

    def read(self, expert_id: int, target: Region, urgency: int) -> Read:
        """A read into ``target`` on the GPU: queued already if it is in RAM, else from the disk."""
        after = self._device.record()  # the slot's last readers have been launched
        slot = self._claim(expert_id)
        read = Read(expert_id, urgency, slot.record.tensor.numpy().data)
        if slot.state is READING:
            # What stays in a read must not keep it: this does, until it has been called.
            read.after = partial(self._forward, read, slot, target, after)
        else:
            self._forward(read, slot, target, after, True)
            read.done = True
        return read

    def submit(self, reads: Iterable[Read]) -> None:
        """Start what has to come from the disk.  The cache hears of the uses later, by
        ``note_uses`` or before it judges: what is computed does not wait for that."""
        reads = list(reads)
        self._disk.submit(reads)
        with self._lock:
            self._uses += [read.expert_id for read in reads]

    def note_uses(self, more: Iterable[int] = ()) -> None:
        """The cache hears of what was submitted, and of experts that were used where they lie."""
        with self._lock:
            self._uses += more
            self._hear()

    def _hear(self) -> None:
        if len(self.cache) == len(self.store.held_N):  # none is ever evicted: only count
            self.cache.hits += len(self._uses)
        elif self._uses:
            self.cache.use(np.array(self._uses)[:, None, None])
        self._uses.clear()

    def acquire(self, expert_id: int) -> Read:
        """A demand for one record in RAM: ``submit`` starts the read, ``release`` ends its use."""
        slot = self._claim(expert_id)
        read = Read(expert_id, DEMAND, slot.record.tensor.numpy().data)
        if slot.state is READING:
            read.after, slot.read = partial(self._arrived, slot), read
        read.done = read.after is None
        self.acquired[read] = slot
        return read

    def release(self, read: Read) -> None:
        """The record of an acquired read has been used, or is not wanted any more."""
        slot, arrived = self.acquired.pop(read), read.done and read.error is None
        over = read.done or self._disk.cancel(read)
        with self._lock:
            self.bytes_acquired += self._disk.record_bytes if arrived else 0
            if over:
                self._put_back(slot, arrived)
            else:
                self.store.move(slot, LEAVING)

    def release_all(self) -> None:
        """``release`` what was acquired and is no more used."""
        for read in list(self.acquired):
            self.release(read)

    def refer(self, expert_ids: Iterable[int], references: int) -> None:
        """So many more uses of each, which is cached, or fewer."""
        with self._lock:
            for expert_id in expert_ids:
                self.store.refer(self.store.of[expert_id], references)

    def advance(self, tokens: int) -> None:
        """A pass over more tokens begins."""
        with self._lock:
            self._hear()
            self._collect()
            self.cache.advance(tokens)

    def fill(self) -> list[Read] | None:
        """Go on reading experts into free room, behind all else: what is on its way for that, None
        when the RAM is full.  This does not wait.  Raises what made a read fail."""
        failed = next((read.error for read in self._filling if read.error is not None), None)
        self._filling = [read for read in self._filling if not read.done]
        if failed is not None:
            raise failed
        new = list[Read]()
        with self._lock:
            self._collect()
            while len(self._filling + new) < LENT and (id := self.store.to_fill()) is not None:
                slot = self.store.take(id)
                slot.read = read = Read(id, FILL, slot.record.tensor.numpy().data)
                read.after = partial(self._filled, slot)
                new.append(read)
            is_full = self.store.full()
        self._disk.submit(new)
        self._filling += new
        return self._filling if self._filling or not is_full else None

    def _filled(self, slot: Slot, arrived: bool) -> None:
        """What was to fill a slot is in RAM, if it has ``arrived``."""
        self._arrived(slot, arrived)
        with self._lock:
            self._put_back(slot, arrived and not self.store.full())

    def bandwidth(self) -> float:
        """Bytes a second at which records come, by what share of them was in RAM so far."""
        lookups = self.cache.hits + self.cache.misses
        from_disk = self.cache.misses / lookups if lookups else 1.0
        link = self.copy_seconds / self.bytes_copied if self.bytes_copied else 0.0
        return 1 / (from_disk / self._disk.bandwidth() + link + 1e-12)

    def stats(self) -> Json:
        """Those of the disk, and ``host``: bytes copied to the GPU and seconds that copies took,
        bytes of records that the CPU computed with, hits and misses in RAM, bytes of it that are
        page-locked, in how many seconds, and whether that is all that is filled."""
        with self._lock:
            self._hear()
            self._collect()
        counts = {"bytes": self.bytes_copied, "seconds": self.copy_seconds}
        counts |= {"lent_bytes": self.bytes_acquired, "pinned": not self.pinned.refused}
        counts |= {"hits": self.cache.hits, "misses": self.cache.misses}
        counts |= {"pinned_bytes": self.pinned.bytes, "pinned_seconds": self.pinned.seconds}
        return {**self._disk.stats(), "host": counts}

    def close(self) -> None:
        """Stop reading, wait for what is being copied, give the RAM back."""
        self._disk.close()
        with suppress(RuntimeError, DeviceError):  # a GPU that has failed copies no more
            for copy, _ in self._copying:
                copy.synchronize()
        self.pinned.close()

    def _claim(self, expert_id: int) -> Slot:
        """A slot for a use of an expert: its own, or a staged one, READING if to be written."""
        store = self.store
        while True:
            with self._lock:
                if store.state(expert_id) is not CACHED:
                    self._collect()
                if store.state(expert_id) is CACHED:
                    store.refer(store.of[expert_id], 1)
                    return store.of[expert_id]
                if store.available:
                    return store.take(expert_id)
                # All that is on its way has been queued: the oldest copy makes room.
                copy = self._copying[0][0] if self._copying else None
                leaving = store.leaving_reads()
            if copy is not None:
                copy.synchronize()
            else:
                self.wait(leaving)

    def _forward(self, read: Read, slot: Slot, target: Region, after: Event, arrived: bool) -> None:
        """Queue the copy of a record that has arrived in RAM."""
        self._arrived(slot, arrived)
        with self._lock:  # so that the time of a copy holds no part of another
            try:
                if arrived:
                    read.copy = self._device.copy(slot.record, target, after)
            except RuntimeError as problem:
                name = self._device.name
                read.error = DeviceError(f"copying an expert to {name} failed ({problem})")
            finally:
                if read.copy is not None:
                    self._copying.append((read.copy, slot))
                else:
                    self._put_back(slot, arrived=False)

    def _arrived(self, slot: Slot, arrived: bool) -> None:
        """A record is in RAM, if it has ``arrived``."""
        if arrived:
            self.pinned.written(slot.index)
            with self._lock:
                if slot.state is READING:
                    self.store.move(slot, ARRIVED)

    def _collect(self) -> None:
        """Give the slots of copies that are done to the cache; the lock is held."""
        self.store.collect()
        while self._copying and self._copying[0][0].done():
            copy, slot = self._copying.popleft()
            self.bytes_copied += self._disk.record_bytes
            self.copy_seconds += copy.seconds
            self._put_back(slot, arrived=True)

    def _put_back(self, slot: Slot, arrived: bool) -> None:
        """A use ends; the lock is held."""
        if slot.state is CACHED:
            self.store.refer(slot, -1)
        elif not arrived or slot.expert in self.cache.cached:  # the record was read twice at once
            self.store.move(slot, FREE)
        else:
            self._hear()
            self.store.admit(slot)
            if len(self.cache) == self.cache.slots:
                self.pinned.rest()


class Pinning:
    """Page-locks a slab by ``PIN_BYTES``, each piece when all its records, of ``size`` bytes, were
    written once, until the system refuses one: where its limit is reached, each that is refused
    could spoil others."""

    def __init__(self, slab: Region, size: int, device: Device):
        self._device, self._lock = device, threading.Lock()
        self._count = max(1, PIN_BYTES // size)
        self._pieces = slab.split(self._count * size)
        # The slots that nothing has been written to, of each piece that is not locked.
        self._unwritten = {
            piece: set(range(piece * self._count, piece * self._count + records.nbytes // size))
            for piece, records in enumerate(self._pieces)
        }
        self._locked: list[Region] = []
        self.refused = False
        self.bytes, self.seconds, self._total = 0, 0.0, slab.nbytes

    def announced(self) -> str:
        """What will be locked, and in how many seconds, which one piece shows; empty if that is
        little or refused."""
        piece, started = self._pieces[0], time.perf_counter()
        if self._device.reads_in_place or self._total < SAID_BYTES or not self._device.pin(piece):
            return ""
        seconds = (time.perf_counter() - started) * self._total / piece.nbytes
        self._device.unpin(piece)
        what = f"{format_size(self._total)} of RAM are page-locked for {self._device.name}"
        return f"{what} while experts come in, in about {seconds:.1f} s; --ram bounds that"

    def written(self, slot: int) -> None:
        """A record has arrived in ``slot``."""
        piece = slot // self._count
        if piece not in self._unwritten:
            return
        with self._lock:
            slots = self._unwritten.get(piece, {slot})
            slots.discard(slot)
            if not slots:
                self._pin(piece)

    def rest(self) -> None:
        """Nothing more will be written to slots that are free now: lock what is left."""
        if self._unwritten:
            with self._lock:
                for piece in list(self._unwritten):
                    self._pin(piece)

    def _pin(self, piece: int) -> None:
        if self._unwritten.pop(piece, None) is None or self.refused:
            return
        records, started = self._pieces[piece], time.perf_counter()
        if self._device.pin(records):
            self._locked.append(records)
            self.bytes += records.nbytes
            self.seconds += time.perf_counter() - started
            return
        self.refused = True
        locked, total, name = *map(format_size, (self.bytes, self._total)), self._device.name
        logging.getLogger("slotmoe").warning(
            "the system has locked only %s of %s of RAM for %s: copies from the rest are slower; "
            "with less --ram all of it may be locked", locked, total, name
        )  # fmt: skip

    def close(self) -> None:
        while self._locked:
            self._device.unpin(self._locked.pop())
