"""The host tier: experts in RAM between the disk and a card's slots.

A record comes from the disk into a slot here and goes on from there, on the card's stream of
copies, as soon as its last byte has arrived; no thread waits for the copy.  The host slot can be
used for another record when the copy is done, which is looked at when a slot is needed.  Records
can also be *lent*: they stay here, for the CPU to compute with.

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
from slotmoe.offload.tiers.device import Card, Copy, Event
from slotmoe.offload.tiers.disk import DEMAND, DiskReader, Read
from slotmoe.offload.tiers.memory import page_aligned
from slotmoe.offload.tiers.slots import Table

PIN_BYTES = 64 << 20


class HostTier:
    """Experts in RAM under a cache of their own, [cache.slots + transit, record_bytes].
    ``transit`` slots hold what is on its way; at most so many reads may be under way or lent at
    once.  A ``Read`` is done when its copy has been queued."""

    def __init__(self, disk: DiskReader, cache: Cache, transit: int, card: Card):
        slab = page_aligned((cache.slots + transit) * disk.record_bytes).view(-1, disk.record_bytes)
        self._disk, self._table, self._lock, self._card = (
            disk,
            Table(cache, slab),
            threading.Lock(),
            card,
        )
        self._in_use = dict[int, int]()  # cached keys that are being copied or lent, and how often
        self._copying: deque[tuple[Copy, int, int, bool]] = (
            deque()
        )  # copies in their order, with key, slot, cached
        self._lent: dict[Read, tuple[int, bool]] = {}  # slot, cached
        self._pinned = _Pinning(slab, card)
        self.bytes_copied, self.copy_seconds, self.bytes_lent = 0, 0.0, 0
        self.submit, self.hasten, self.cancel, self.wait = (
            disk.submit,
            disk.hasten,
            disk.cancel,
            disk.wait,
        )

    def __contains__(self, key: int) -> bool:
        """Whether ``key`` is in RAM."""
        return key in self._table.cache

    @property
    def cache(self) -> Cache:
        return self._table.cache

    def read(self, key: int, target: Tensor, urgency: int) -> Read:
        """A read of one record into ``target`` on the card: from RAM if it is there, and then
        queued already, else from disk through RAM."""
        after = self._card.record()  # the slot's last readers have been launched
        slot, here = self._claim(key)
        record = self._table.slab[slot]

        def arrived(ok: bool) -> None:
            try:
                if ok:
                    self._pinned.written(slot)
                    self._copy(read, record, target, after)
            finally:
                with self._lock:
                    if read.copy is not None:
                        self._copying.append((read.copy, key, slot, here))
                    else:
                        self._release(key, slot, here, arrived=False)

        read = Read(key, memoryview(b"") if here else record.numpy().data, urgency, arrived)
        if here:
            arrived(True)
            read.done = True
        return read

    def lend(self, key: int) -> Read:
        """A read of one record into RAM alone, ahead of all prefetches; ``submit`` starts it.
        ``give_back`` it."""
        slot, here = self._claim(key)

        def arrived(ok: bool) -> None:
            if ok:
                self._pinned.written(slot)
                return
            with self._lock:
                if self._lent.pop(read, None) is not None:
                    self._release(key, slot, here, arrived=False)

        read = Read(
            key, memoryview(b"") if here else self._table.slab[slot].numpy().data, DEMAND, arrived
        )
        read.done = here
        self._lent[read] = slot, here
        return read

    def record(self, read: Read) -> Tensor:
        """The record, uint8 [record_bytes] in RAM, of a lent read that is done."""
        return self._table.slab[self._lent[read][0]]

    def give_back(self, read: Read) -> None:
        """The record of a lent read that is done has been used, or is not wanted any more."""
        with self._lock:
            if (lent := self._lent.pop(read, None)) is not None:
                self.bytes_lent += self._disk.record_bytes
                self._release(read.key, *lent, arrived=read.error is None)

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins; what an interrupted one has borrowed comes
        back."""
        for read in list(self._lent):
            if not read.done and not self._disk.cancel(read):
                self._disk.wait([read])
            self.give_back(read)
        with self._lock:
            self._collect()
            self._table.cache.advance(tokens)

    def fill(self, keys: Iterable[int]) -> None:
        """Read ``keys`` that are not here into free room, and wait."""
        pending: list[Read] = []
        room = self.cache.slots - len(self.cache)
        for key in (key for key in keys if key not in self.cache):
            if room <= 0:
                break
            room -= 1
            pending.append(self.lend(key))
            self.submit(pending[-1:])
            if len(pending) == LENT:
                self._finish(pending)
        while pending:
            self._finish(pending)

    def _finish(self, pending: list[Read]) -> None:
        for read in self.wait(pending):
            pending.remove(read)
            self.give_back(read)
            self.bytes_lent -= self._disk.record_bytes
            if read.error is not None:
                raise read.error

    def bandwidth(self) -> float:
        """Bytes a second at which records come, by what share of them was in RAM so far."""
        looked = self.cache.hits + self.cache.misses
        from_disk = self.cache.misses / looked if looked else 1.0
        link = self.copy_seconds / self.bytes_copied if self.bytes_copied else 0.0
        return 1 / (from_disk / self._disk.bandwidth() + link + 1e-12)

    def stats(self) -> dict[str, Any]:
        """Those of the disk, and ``host``: bytes copied to the card and seconds that copies took,
        bytes of records that the CPU computed with, hits and misses in RAM, and whether it is
        page-locked as far as it is filled."""
        with self._lock:
            self._collect()
        counts = {
            "bytes": self.bytes_copied,
            "seconds": self.copy_seconds,
            "lent_bytes": self.bytes_lent,
        }
        counts |= {
            "hits": self.cache.hits,
            "misses": self.cache.misses,
            "pinned": not self._pinned.refused,
        }
        return {**self._disk.stats(), "host": counts}

    def close(self) -> None:
        """Stop reading, wait for what is being copied, give the RAM back."""
        self._disk.close()
        for copy, *_ in self._copying:
            copy.synchronize()
        self._pinned.close()

    def _claim(self, key: int) -> tuple[int, bool]:
        """The slot of ``key`` and True, or a free one and False."""
        with self._lock:
            self._collect()
            if self._table.cache.use(key):
                self._in_use[key] = self._in_use.get(key, 0) + 1
                return self._table.slot_of[key], True
            while (
                not self._table.free
            ):  # all that is on its way has been queued: the oldest copy makes room
                self._copying[0][0].synchronize()
                self._collect()
            return self._table.free.pop(), False

    def _copy(self, read: Read, record: Tensor, target: Tensor, after: Event) -> None:
        try:
            read.copy = self._card.copy(record, target, after)
        except RuntimeError as problem:
            read.error = DeviceError(f"copying an expert to {self._card.name} failed ({problem})")

    def _collect(self) -> None:
        """Give the slots of copies that are done to the cache; the lock is held."""
        while self._copying and self._copying[0][0].done():
            copy, key, slot, here = self._copying.popleft()
            self.bytes_copied += self._disk.record_bytes
            self.copy_seconds += copy.seconds
            self._release(key, slot, here, arrived=True)

    def _release(self, key: int, slot: int, here: bool, arrived: bool) -> None:
        if here:
            self._in_use[key] -= 1
            if self._in_use[key] == 0:
                del self._in_use[key]
        elif (
            not arrived or key in self._table.cache
        ):  # in the cache: the same record was read twice at once
            self._table.free.append(slot)
        else:
            self._table.slot_of[key] = slot
            self._table.settle(key, keep=self._in_use)
            if len(self.cache) == self.cache.slots:
                self._pinned.rest()


class _Pinning:
    """Page-locks a slab in pieces of ``PIN_BYTES``, each when all its records have been written
    once."""

    def __init__(self, slab: Tensor, card: Card):
        self._slab, self._card, self._lock = slab, card, threading.Lock()
        self._each = max(1, PIN_BYTES // slab.shape[1])
        self._missing = [
            set(range(start, min(start + self._each, len(slab))))
            for start in range(0, len(slab), self._each)
        ]
        self._locked: set[int] = set()
        self.refused = False

    def written(self, slot: int) -> None:
        """A record has arrived in ``slot``."""
        piece = slot // self._each
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
        if piece not in self._locked and not self.refused:
            if self._card.pin(self._piece(piece)):
                self._locked.add(piece)
            else:
                self.refused = True
                logging.getLogger("slotmoe").warning(
                    "the system locks no more RAM for %s; copies from it are slower",
                    self._card.name,
                )

    def _piece(self, piece: int) -> Tensor:
        return self._slab[piece * self._each : (piece + 1) * self._each]

    def close(self) -> None:
        for piece in self._locked:
            self._card.unpin(self._piece(piece))
