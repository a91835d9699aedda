"""Where expert records live and how they move: reads from disk, the host tier, and the slots that a
step computes from.

    Slots       one slab of records on the fast tier (the GPU's memory; RAM when there is no GPU)
      | read(key, slot, urgency) -> Read
    HostTier    a slab in pinned RAM, only when the fast tier is a GPU's memory (``slotmoe.offload.tiers.host``)
      | read(key, slot, urgency) -> Read
    DiskReader  threads with several aligned O_DIRECT reads in flight, the most urgent first

The step never polls: it asks for what it misses, computes what it has, and waits on ``Read``s.  A
record counts as present only when its last byte has arrived and its checksum is right, so an
interrupted step leaves nothing half-filled. An expert is named everywhere by one integer, its key:
(index of the MoE layer) * n_routed_experts + expert.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from slotmoe.errors import DeviceError
from slotmoe.offload.policy.cache import Cache
from slotmoe.offload.tiers.device import Card
from slotmoe.offload.tiers.disk import DEMAND, WARM, Read, Source
from slotmoe.offload.tiers.memory import Touching, page_aligned

LAZY_BYTES = 256 << 20  # a slab beyond this gets its pages while the first tokens are made


class Table:
    """A slab [slots + transit, record_bytes] and which key is in which slot.

    ``cache`` decides which keys stay, at most ``cache.slots`` of them; the other ``transit`` slots
    hold records on their way in, so that nothing has to leave before its successor is there, and a
    wrong prefetch costs no cached expert.
    """

    def __init__(self, cache: Cache, slab: Tensor):
        self.cache, self.slab = cache, slab
        self.slot_of: dict[int, int] = {}
        self.free = list(range(len(slab) - 1, -1, -1))

    def settle(self, key: int, keep: Collection[int]) -> int | None:
        """``key`` was used and is not cached: let the cache admit it in place of another, or free
        its slot.  Who left, if any."""
        leaving = self.cache.offer(key, keep)
        if leaving is not None:
            self.free.append(self.slot_of.pop(leaving))
        return leaving


class Slots:
    """Expert slots of the fast tier, [cache.slots + transit, record_bytes] in RAM or on ``card``;
    ``reserve`` of the transit slots are for demands alone, at least as many as one token's experts
    of a layer.

    ``table_LE``, int32 [layers, E] on the device, says which slot a cached expert is in, and -1 of
    the others.

    In RAM a large slab grows: it begins with a few slots, and a thread gets the pages of the others
    (``Touching``)."""

    def __init__(
        self,
        source: Source,
        cache: Cache,
        transit: int,
        reserve: int,
        record_bytes: int,
        card: Card | None = None,
    ):
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
        self._leaving: list[
            tuple[Read, int]
        ] = []  # given up, but a piece is still arriving in the slot
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
        """The record of ``key``, which is cached or whose read is done: uint8 [record_bytes] on the
        device."""
        return self._records[self._table.slot_of[key]]

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins.  What an interrupted one has left in transit is
        given up; the cache takes what has arrived to warm it."""
        for key in [key for key, read in self._coming.items() if read.urgency != WARM]:
            self.drop(key)
        self.adopt()
        self.cache.advance(tokens)
        self._source.advance(tokens)

    def demand(self, keys: Collection[int], keep: Collection[int]) -> list[Read]:
        """Reads of ``keys``, none of them cached, ahead of all prefetches; what is in ``keep``
        stays.  At most ``transit``."""
        reads, new = [], []
        for key in keys:
            read = self._coming.get(key)
            if (
                read is not None and read.error is not None
            ):  # a prefetch that failed: now it matters, so try again
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
        """Start reading ``key`` unless that would leave fewer than ``reserve`` transit slots
        free."""
        self._collect()
        if len(self._coming) + len(self._leaving) + self._reserve >= self.transit:
            return False
        self._source.submit([self._begin(key, urgency, ())])
        return True

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until some of ``reads`` are done and return them; on a card the kernels launched
        from now on wait for their copies.  Raises what made one fail; its slot is free then."""
        started = time.perf_counter()
        finished = self._source.wait(reads)
        self.wait_seconds += time.perf_counter() - started
        for read in finished:
            if read.copy is not None and self._card is not None and read.error is None:
                try:
                    self._card.wait(read.copy)
                except RuntimeError as problem:
                    read.error = DeviceError(
                        f"copying an expert to {self._card.name} failed ({problem})"
                    )
            if read.error is not None:
                self.drop(read.key)
                raise read.error
        return finished

    def settle(self, key: int, keep: Collection[int]) -> None:
        """``key``, in transit, has been used: the cache keeps it or lets it go.  ``keep`` is not
        evicted for it."""
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
        """Make the table what it has to be: a step that was interrupted may have changed only one
        of the two."""
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
        """Bytes of cached records, and bytes of the slab that have their pages by now; for another
        thread to ask now and then."""
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
        for key in [
            key for key, read in self._coming.items() if read.urgency == WARM and _arrived(read)
        ]:
            if len(self.cache) < self.cache.slots and self._coming[key].error is None:
                del self._coming[key]
                self.cache.add(key)
                self._entered(key, None)
            else:
                self.drop(key)

    def fill(self, keys: Iterable[int], done: Callable[[], None]) -> None:
        """Read uncached ``keys`` into the cache's free room, several at a time, and wait;
        ``done()`` after each."""
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
        """A free slot; the oldest prefetch that nobody wants now gives its own up if there is
        none."""
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
