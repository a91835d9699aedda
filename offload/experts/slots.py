"""The device tier: one slab of records on the device, which a step computes from.

A step never polls: it asks for what it misses, computes what is cached, and waits on ``Read``s.  A
record counts as present only when its last byte has arrived and its checksum is right.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from slotmoe.errors import DeviceError, SlotmoeError
from slotmoe.model.config import Config
from slotmoe.model.names import expert_name, expert_shapes
from slotmoe.network.layer_types import Biases, Mlp
from slotmoe.offload.devices.device import Device, Region
from slotmoe.offload.devices.pages import Touching
from slotmoe.offload.experts.disk import DiskReader
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.store import (
    ARRIVED,
    CACHED,
    DEMAND,
    FILL,
    FREE,
    READING,
    STALE,
    ExpertStore,
    Read,
    Slot,
)
from slotmoe.offload.plan.memory import LENT
from slotmoe.offload.policy.cache import Cache, make_cache
from slotmoe.quant.backends.base import Prepared, Records

_FILL_BYTES = 64 << 20  # on their way into free room at once, or some records
LAZY_BYTES = 256 << 20  # a slab beyond this gets its pages while the first tokens are made


class _InMemory:
    """In place of a disk: every read is done at once."""

    def read(self, expert_id: int, target: Region, urgency: int) -> Read:
        return Read(expert_id, urgency, done=True)

    def wait(self, reads: Collection[Read]) -> list[Read]:
        return list(reads)

    def submit(self, reads: Iterable[Read]) -> None: ...
    def promote(self, read: Read) -> None: ...
    def cancel(self, read: Read) -> bool:
        return True


Source = DiskReader | HostTier | _InMemory


class Slots:
    """An ``ExpertStore`` on ``device`` that gets records of ``size`` bytes from ``source``;
    ``reserve`` staging slots are for demands alone, at least one token's experts of a layer.

    In RAM a large slab begins with a few slots; ``Touching`` makes the others' pages present.
    """

    def __init__(
        self, source: Source, cache: Cache, staging: int, reserve: int, size: int, device: Device
    ):
        self._all = cache.layers * cache.experts
        self._complete = False
        total = min(cache.slots + staging, self._all)
        self.slab, self.record_bytes = device.region(total, size), size
        self.source, self._device, self.cache = source, device, cache
        # Whether experts are read in order of layer, behind all else, until no slot is free.  They
        # are worth nothing until they are used, so where not all fit they are the first to leave;
        # and a layer that is whole lets the next pass go through.
        self.fills = False
        self.staging, self._reserve = staging, reserve
        self.wait_seconds, self.reclaimed = 0.0, 0
        self.planned, self._touched = cache.slots, 0
        ready = max(staging + reserve, LAZY_BYTES // size)
        self._touching: Touching | None = None
        if ready < total and device.tier == "ram":
            self._touching = Touching(self.slab.tensor, ready * size)
            cache.slots = ready - staging
        ready = ready if self._touching else total
        self.store = ExpertStore(cache, self.slab.split(size), ready)
        # What the device was told last of the store's table.
        self._told_ME = device.empty((cache.layers, cache.experts), torch.int32).fill_(-1)
        self._told = 0  # changes

    @property
    def slots_ME(self) -> Tensor:
        """The slot of each cached expert, int32 [MoE layers, E] on the device; -1 of the others.
        All changes since the last look go there at once."""
        if self._told != self.store.changes:
            self._told = self.store.changes
            self._device.write(self.store.table_ME, self._told_ME)
        return self._told_ME

    @property
    def complete(self) -> bool:
        """Whether every expert is cached; then none is ever evicted."""
        if not self._complete:
            self._complete = len(self.cache) == self._all
        return self._complete

    def room(self) -> int:
        """Slots of the cache that are free now."""
        self._grow()
        return self.cache.slots - len(self.cache)

    def __contains__(self, expert_id: int) -> bool:
        """Whether the expert has a slot, cached or on its way."""
        return self.store.state(expert_id) > STALE

    # A pass

    def advance(self, tokens: int) -> None:
        """A pass over more tokens begins.  What the last one has left in staging is given up."""
        self.store.held_N.fill(False)
        if self.store.staged:
            for slot, read in self.store.coming():
                if read.urgency != FILL or self._device.queues:
                    self._give_up(slot)
        self.cache.advance(tokens)

    def release(self) -> None:
        """A layer's work has ended: nothing is held any more, and unused demands are given up."""
        self.store.held_N.fill(False)
        if self.store.staged:
            for slot, read in self.store.coming():
                if read.urgency == DEMAND:
                    self._give_up(slot)

    def demand(self, expert_ids: Collection[int]) -> list[Read]:
        """Reads of experts that are not cached, ahead of all prefetches.  So many may be demanded
        and not yet admitted as there are staging slots."""
        of, new, reads = self.store.of, list[Read](), []
        for expert_id in expert_ids:  # before any prefetch gives its slot up for another
            slot = of.get(expert_id)
            if slot is not None and slot.state is not STALE:
                self._promote(slot)
        for expert_id in expert_ids:
            slot = of.get(expert_id)
            read = None if slot is None or slot.state is STALE else slot.read
            reads.append(read or self._begin(expert_id, DEMAND, new))
        if new:
            self.source.submit(new)
        return reads

    def prefetch(self, expert_id: int, urgency: int) -> bool:
        """Start reading an expert unless fewer than ``reserve`` staging slots would be free."""
        if not self.has_staging():
            return False
        new = list[Read]()
        self._begin(expert_id, urgency, new)
        self.source.submit(new)
        return True

    def has_staging(self) -> bool:
        """Whether something may be prefetched."""
        self.store.collect()
        return len(self.store.staged) + self._reserve < self.staging

    def drop(self, expert_id: int) -> None:
        """Give up an expert in staging, arrived or not; nothing happens if it is not there."""
        if READING <= self.store.state(expert_id) <= ARRIVED:
            self._give_up(self.store.of[expert_id])

    def wait(self, reads: Collection[Read]) -> None:
        """Block until one of ``reads`` is done."""
        started = time.perf_counter()
        self.source.wait(reads)
        self.wait_seconds += time.perf_counter() - started

    def take(self, reads: Collection[Read]) -> None:
        """Use ``reads`` that are done: kernels launched from now on run after their copies.  Raises
        what made one fail; its slot is free then."""
        for read in reads:
            slot = self.store.of[read.expert_id]
            self._wait_for_copy(read)
            if read.error is not None:
                self._give_up(slot)
                raise read.error
            if slot.state is READING:
                self.store.move(slot, ARRIVED)

    def admit(self, expert_id: int, must: bool = False) -> None:
        """An expert in staging has been used: see ``ExpertStore.admit``."""
        self._grow()
        self.store.admit(self.store.of[expert_id], must)

    def admit_guesses(self) -> None:
        """Let the cache admit what was read ahead and has arrived."""
        for slot, read in self.store.coming():
            if DEMAND < read.urgency < FILL and read.arrived and read.error is None:
                self.take([read])
                self.admit(slot.expert, must=True)

    def fill_behind(self, idle: bool = False) -> bool:
        """While it ``fills``, go on with that; whether more is to come.  This does not wait.  What
        fails ends it: who needs that hears."""
        try:
            self._fill(idle)
        except (SlotmoeError, OSError):
            self.fills = False
        return self.fills

    def fill(self, done: Callable[[], None]) -> None:
        """Fill free slots and wait for that; ``done()`` as records come."""
        self._finish_growing()
        self.advance(0)  # what a pass has left in staging takes room
        self.fills = True
        try:
            while self.fills:
                if reads := self._fill(idle=True):
                    self.source.wait(reads)
                done()
        finally:
            self.fills = False

    def _fill(self, idle: bool) -> list[Read]:
        """Go on: what is on its way to fill slots, and below a GPU RAM before those.  Copies
        to a GPU wait for each other, so they are made while it is idle."""
        reads = None
        if self.fills and isinstance(self.source, HostTier):
            reads = self.source.fill()
        if self.fills and reads is None and (idle or not self._device.queues):
            reads = self._fill_free()
            self.fills = reads is not None
        return reads or []

    def _fill_free(self) -> list[Read] | None:
        """What is on its way into free room, behind all else; None when no slot is free."""
        self.store.collect()
        coming = [(slot, read) for slot, read in self.store.coming() if read.urgency == FILL]
        for slot, read in coming:
            self._grow()
            if self.store.full():
                self._give_up(slot)
            elif read.done:
                self.take([read])
                self.store.move(slot, CACHED)
        reads, new = [read for slot, read in coming if slot.state is READING], list[Read]()
        room = self.room()
        # A demand's copy waits for the one that is under way, so it is never more than one.
        most = max(LENT, _FILL_BYTES // self.record_bytes)
        if self._device.tier == "vram":  # nor are there so many read buffers below
            most = 1 if self._device.queues else LENT
        while room and len(reads) < most and (expert_id := self.store.to_fill()) is not None:
            reads.append(self._begin(expert_id, FILL, new))
        self.source.submit(new)
        return reads if reads or self._touching is not None or not self.store.full() else None

    def memory(self) -> Tensor:
        """All slots as one, uint8, with all its pages."""
        self._finish_growing()
        return self.slab.tensor

    def present(self) -> tuple[int, int]:
        """Bytes of cached records, and of the slab in use by now.  Another thread may ask."""
        size, touching = self.record_bytes, self._touching
        used = (len(self.cache) + len(self.store.staged)) * size
        if touching is not None:  # its pages, and those of the first slots that are in use
            used = touching.ready - touching.start + min(used, touching.start)
        self._touched = max(self._touched, used)  # pages never go
        return len(self.cache) * size, self._touched

    def close(self) -> None:
        """Stop what still goes on in other threads; the source is closed by itself."""
        if self._touching is not None:
            self._touching.close()

    def _finish_growing(self) -> None:
        if self._touching is not None:
            self._touching.finish()
        self._grow()

    def _grow(self) -> None:
        """Take over the slots whose pages are present now."""
        if self._touching is None:
            return
        ready = self._touching.ready // self.record_bytes
        self.store.grow(ready)
        self.cache.slots = ready - self.staging
        if ready * self.record_bytes == self.slab.nbytes:
            self.cache.slots, self._touching = self.planned, None
            self._touched = self.slab.nbytes

    def _begin(self, expert_id: int, urgency: int, new: list[Read]) -> Read:
        """Stage a slot for an expert; ``new`` gets what its source has to be told of, if any."""
        store = self.store
        if store.leaving or not store.available:
            self._make_room()
        slot = store.take(expert_id)
        if slot.state is ARRIVED:
            copy = slot.read.copy if slot.read is not None else None
            slot.read = read = Read(expert_id, urgency, done=True, copy=copy)
            self._wait_for_copy(read)
            if read.error is None:
                self.reclaimed += 1
                return read
            store.move(slot, FREE)
            slot = store.take(expert_id)
        try:
            slot.read = read = self.source.read(expert_id, slot.record, urgency)
        except BaseException:
            store.move(slot, FREE)
            raise
        new.append(read)
        return read

    def _promote(self, slot: Slot) -> None:
        """What was to be read ahead is demanded; where that has failed, it is tried again."""
        read = slot.read
        assert read is not None
        if read.done:
            self._wait_for_copy(read)
        if read.error is not None:
            self._give_up(slot)
        elif read.done:
            read.urgency = DEMAND  # no guess any more, which ``admit_guesses`` may take
        else:
            self.source.promote(read)

    def _wait_for_copy(self, read: Read) -> None:
        """Kernels launched from now on run after the copy of a read that is done."""
        if read.copy is not None and read.error is None:
            try:
                self._device.wait(read.copy)
                read.copy = None
            except RuntimeError as problem:
                name = self._device.name
                read.error = DeviceError(f"copying an expert to {name} failed ({problem})")

    def _give_up(self, slot: Slot) -> None:
        self.store.give_up(slot, self.source.cancel)

    def _make_room(self) -> None:
        """If no slot is available, the oldest prefetch gives its own up."""
        store = self.store
        store.collect()
        while not store.available:
            unwanted = (slot for slot, read in self.store.coming() if read.urgency != DEMAND)
            if (slot := next(unwanted, None)) is not None:
                self._give_up(slot)
            else:
                self.source.wait(store.leaving_reads())
            store.collect()


class CheckpointRecords(Records):
    """Experts of a checkpoint by the number of their slot, which is the expert id."""

    def __init__(self, config: Config, weights: Mapping[str, Prepared]):
        self._config, self._weights = config, weights

    def mlp(self, slot: int) -> Mlp[Prepared]:
        moe_layer, expert = divmod(slot, self._config.n_routed_experts)
        layer = self._config.moe_layers[moe_layer]
        names = (expert_name(layer, expert, part) for part in expert_shapes(self._config))
        gate, up, down, *biases = (self._weights[name] for name in names)
        return Mlp(gate, up, down, cast(Biases | None, tuple(biases) or None))


def resident_slots(config: Config, device: Device) -> Slots:
    """The reference path's: a slot for each expert, which is in it for good."""
    layers, experts = len(config.moe_layers), config.n_routed_experts
    cache = make_cache("lru", layers * experts, layers, experts)
    slots = Slots(_InMemory(), cache, 1, 0, 1, device)  # a byte stands for an expert
    slots.fill(lambda: None)
    return slots
