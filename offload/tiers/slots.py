"""Expert slots: one slab of records on the device, which a step computes from.

    Slots       a slab on the device (a GPU's memory; RAM when there is no GPU)
      | read(expert_id, slot, urgency) -> Read
    DiskReader  threads with several aligned direct reads in flight (``slotmoe.offload.tiers.disk``)
    HostTier    below a GPU: the same, through a slab in page-locked RAM
                (``slotmoe.offload.tiers.host``)

A step never polls: it asks for what it misses, computes what is cached, and waits on ``Read``s.  A
record counts as present only when its last byte has arrived and its checksum is right.  An expert
id is (MoE layer index) * n_routed_experts + expert.

An exception may end a step at any line.  No order of changes protects against that: the next step
calls ``recover``, which derives everything from what certainly holds.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slotmoe.errors import DeviceError
from slotmoe.offload.policy.cache import Cache
from slotmoe.offload.tiers.device import Device
from slotmoe.offload.tiers.disk import DEMAND, WARM, DiskReader, Read
from slotmoe.offload.tiers.pages import Touching

LAZY_BYTES = 256 << 20  # a slab beyond this gets its pages while the first tokens are made


class Table:
    """A slab [slots + staging, record_bytes] and which expert id is in which slot.

    ``cache`` decides which experts stay, at most ``cache.slots`` of them.  The other slots are for
    staging: they hold records on their way in, so that nothing is evicted before its successor has
    arrived, and a wrong prefetch costs no cached expert.

    What leaves the cache, or is not admitted, is ``left`` in its slot until that is needed, and may
    be wanted again meanwhile: the least worth is overwritten first.
    """

    def __init__(self, cache: Cache, slab: Tensor):
        self.cache, self.slab = cache, slab
        self.slot_of: dict[int, int] = {}
        self.left: dict[int, int] = {}  # by expert id: slots that are free, too
        self.free = list(range(len(slab) - 1, -1, -1))
        self.records = slab.unbind()  # a view of each slot: to make one takes longer than to copy
        self._ranked: list[int] = []  # what was left once, that of least worth last

    def admit(self, expert_id: int, pinned: Collection[int], must: bool = False) -> int | None:
        """Let the cache admit an expert that was used, in place of another, or free its slot.
        Returns the expert id that lost its slot, if any."""
        evicted = self.cache.offer(expert_id, pinned, must)
        if evicted is not None:
            if evicted in self.left:  # the host tier may read a record twice at once
                self.free.append(self.left[evicted])
            self.left[evicted] = self.slot_of.pop(evicted)
        return evicted

    def acquire(self, expert_id: int) -> tuple[int, bool]:
        """One of the free slots, of which there are some, for an expert, and whether its record is
        in there."""
        if expert_id in self.left:
            return self.left.pop(expert_id), True
        return self.free.pop() if self.free else self.left.pop(self._least()), False

    def rank(self) -> None:
        """Order what is ``left`` by its present worth, for those who ``acquire`` next."""
        self._ranked = self.cache.by_worth(self.left)

    def _least(self) -> int:
        """What is left and was of least worth when it was ranked, or is now if all that was ranked
        is gone."""
        while self._ranked:
            if (expert_id := self._ranked.pop()) in self.left:
                return expert_id
        return self.cache.by_worth(self.left)[-1]

    def restore(self, slots: range, staged: Collection[int] = ()) -> None:
        """Make cache, map and free list, of which an interrupted step may have changed any, agree.
        An expert that is not ``staged`` is cached if the cache and the map say so and no other has
        its slot; all else of ``slots`` is free."""
        certain = {id: slot for id, slot in self.slot_of.items() if id in self.cache}
        uses = Counter(certain.values())
        self.slot_of = {
            id: slot for id, slot in certain.items() if uses[slot] == 1 and id not in staged
        }
        self.cache.restore(self.slot_of)
        self.left.clear()
        self.free = sorted(set(slots).difference(self.slot_of.values()), reverse=True)


class Slots:
    """Expert slots, uint8 [cache.slots + staging, record_bytes] on ``device``; ``reserve`` of the
    staging slots are for demands alone, at least as many as one token's experts of a layer.

    In RAM a large slab grows: it begins with a few slots, and a thread makes the others' pages
    present (``Touching``).
    """

    def __init__(
        self,
        source: DiskReader,
        cache: Cache,
        staging: int,
        reserve: int,
        record_bytes: int,
        device: Device,
    ):
        total = min(cache.slots + staging, cache.layers * cache.experts)
        self.slab = device.empty((total, record_bytes), torch.uint8)
        self._source, self._device = source, device
        self.table, self.cache = Table(cache, self.slab), cache
        # The slot of each cached expert, -1 of the others: what the host knows, and what the device
        # was told last.
        shape = cache.layers, cache.experts
        self._known_ME = torch.full(shape, -1, dtype=torch.int32)
        self._told_ME, self._changed = device.empty(shape, torch.int32).fill_(-1), False
        self.staging, self._reserve = staging, reserve
        self.coming: OrderedDict[int, Read] = OrderedDict()  # in staging slots, oldest first
        # Given up, but a piece of the record is still arriving in the slot.
        self.abandoned: list[tuple[Read, int]] = []
        self.wait_seconds, self.reclaimed = 0.0, 0
        # Whether all this is as a step leaves it at its end; else ``recover`` comes first.
        self.consistent = True
        self.planned, self._touched = cache.slots, 0
        first = max(staging + reserve, LAZY_BYTES // record_bytes)
        self._touching: Touching | None = None
        if first < total and device.tier == "ram":
            self._touching = Touching(self.slab.view(-1), first * record_bytes)
            self.table.free, cache.slots = self.table.free[-first:], first - staging

    @property
    def slots_ME(self) -> Tensor:
        """The slot of each cached expert, int32 [MoE layers, E] on the device; -1 of the others.
        All changes since the last look go there at once."""
        if self._changed:
            self._device.write(self._known_ME, self._told_ME)
            self._changed = False
        return self._told_ME

    def _set_slot(self, expert_id: int, slot: int) -> None:
        self._changed = True  # first, whatever interrupts
        self._known_ME.view(-1).numpy()[expert_id] = slot

    @property
    def complete(self) -> bool:
        """Whether every expert is cached; then none is ever evicted."""
        return len(self.cache) == self.cache.layers * self.cache.experts

    def __contains__(self, expert_id: int) -> bool:
        """Whether the expert has a slot, cached or on its way."""
        return expert_id in self.table.slot_of

    def at_hand(self, expert_id: int) -> bool:
        """Whether the expert need not be read: it has a slot, or is still in one that is free."""
        return expert_id in self.table.slot_of or expert_id in self.table.left

    def on_their_way(self, expert_ids: Iterable[int]) -> list[int]:
        """Those whose read has begun."""
        coming = self.coming
        return [id for id in expert_ids if id in coming]

    def in_free_slots(self, expert_ids: Iterable[int]) -> list[int]:
        """Those that have no slot any more, but are still in one that is free."""
        left = self.table.left
        return [id for id in expert_ids if id in left]

    def rank(self) -> None:
        """Order the free slots for the demands to come."""
        if self.table.left:
            self.table.rank()

    def slot(self, expert_id: int) -> int:
        """The row of the slab with an expert's record, cached or arrived."""
        return self.table.slot_of[expert_id]

    def memory(self) -> Tensor:
        """All slots as one, uint8, with all its pages."""
        with self.changing():
            self._finish_growing()
        return self.slab.view(-1)

    def _finish_growing(self) -> None:
        if self._touching is not None:
            self._touching.finish()
        self._grow()

    def _grow(self) -> None:
        """Take over the slots whose pages are present now."""
        if self._touching is None:
            return
        known, ready = self.cache.slots + self.staging, self._ready()
        self.table.free[:0] = range(known, ready)
        self._set_ready(ready)

    def _ready(self) -> int:
        """Slots whose pages are present."""
        touching = self._touching
        return len(self.slab) if touching is None else touching.ready // self.slab.shape[1]

    def _set_ready(self, ready: int) -> None:
        if ready < len(self.slab):
            self.cache.slots = ready - self.staging
        else:
            self.cache.slots, self._touching = self.planned, None
            self._touched = self.slab.nbytes

    def advance(self, tokens: int) -> None:
        """A pass over more tokens begins.  What the last one has left in staging is given up; the
        cache admits what has arrived to warm it."""
        for expert_id in [id for id, read in self.coming.items() if read.urgency != WARM]:
            self.drop(expert_id)
        self.admit_warm()
        self.cache.advance(tokens)
        self._source.advance(tokens)

    def demand(self, expert_ids: Collection[int], pinned: Collection[int]) -> list[Read]:
        """Reads of experts that are not cached, at most ``staging``, ahead of all prefetches; what
        is ``pinned`` stays."""
        reads, new = [], []
        for expert_id in expert_ids:
            read = self.coming.get(expert_id)
            if read is not None and read.error is not None:  # a prefetch that failed: try again
                self.drop(expert_id)
                read = None
            if read is None:
                read = self._begin(expert_id, DEMAND, pinned)
                new += [] if read.done else [read]
            elif read.done:
                read.urgency = DEMAND  # no guess any more, which ``admit_guesses`` may take
            else:
                self._source.promote(read)
            reads.append(read)
        self._source.submit(new)
        return reads

    def prefetch(self, expert_id: int, urgency: int) -> bool:
        """Start reading an expert unless that would leave fewer than ``reserve`` staging slots
        free."""
        self._collect()
        if len(self.coming) + len(self.abandoned) + self._reserve >= self.staging:
            return False
        read = self._begin(expert_id, urgency, ())
        self._source.submit([] if read.done else [read])
        return True

    def wait(self, reads: Collection[Read]) -> None:
        """Block until one of ``reads`` is done."""
        started = time.perf_counter()
        self._source.wait(reads)
        self.wait_seconds += time.perf_counter() - started

    def take(self, reads: Collection[Read]) -> None:
        """Use ``reads`` that are done: kernels launched from now on run after their copies.  Raises
        what made one fail; its slot is free then."""
        for read in reads:
            if read.copy is not None and read.error is None:
                try:
                    self._device.wait(read.copy)
                except RuntimeError as problem:
                    name = self._device.name
                    read.error = DeviceError(f"copying an expert to {name} failed ({problem})")
            if read.error is not None:
                self.drop(read.expert_id)
                raise read.error

    def admit(self, expert_id: int, pinned: Collection[int], must: bool = False) -> None:
        """An expert in staging has been used: the cache admits or rejects it, or ``must`` admit it.
        What is ``pinned`` is not evicted for it."""
        self._grow()
        del self.coming[expert_id]
        evicted = self.table.admit(expert_id, pinned, must)
        if evicted == expert_id:
            return
        if evicted is not None:
            self._set_slot(evicted, -1)
        self._set_slot(expert_id, self.table.slot_of[expert_id])

    def admit_guesses(self, pinned: Collection[int]) -> None:
        """Let the cache admit what was read ahead and has arrived, in place of what is not
        ``pinned``."""
        for expert_id, read in list(self.coming.items()):
            if DEMAND < read.urgency < WARM and read.arrived and read.error is None:
                self.take([read])
                self.admit(expert_id, pinned, must=True)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Slots change inside; where that does not come to its end, ``recover`` has to follow."""
        self.recover()
        self.consistent = False
        yield
        self.consistent = True

    def recover(self) -> None:
        """If the last step did not end, bring everything into the state between two steps: no read
        goes on, nothing is staged, no slot is lost, the device's slot table says what is true."""
        if self.consistent:
            return
        self._source.abandon()
        ready = self._ready()
        self.table.restore(range(ready), staged=self.coming)
        if self._touching is not None:
            self._set_ready(ready)
        self.coming.clear()
        self.abandoned.clear()
        for expert_id in range(self._known_ME.numel()):
            self._set_slot(expert_id, self.table.slot_of.get(expert_id, -1))
        self.consistent = True

    def drop(self, expert_id: int) -> None:
        """Give up an expert in staging, arrived or not; nothing happens if it is not there."""
        if expert_id not in self.coming:
            return
        read, slot = self.coming.pop(expert_id), self.table.slot_of.pop(expert_id)
        if read.arrived and read.error is None:
            self.table.left[expert_id] = slot
        elif read.done or self._source.cancel(read):
            self.table.free.append(slot)
        else:
            self.abandoned.append((read, slot))

    def present(self) -> tuple[int, int]:
        """Bytes of cached records, and bytes of the slab that are in use by now.  Another thread
        may ask."""
        size, touching = self.slab.shape[1], self._touching
        used = (len(self.cache) + len(self.coming) + len(self.abandoned)) * size
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

    def admit_warm(self) -> None:
        """Let the cache admit what was read to warm it and has arrived, as long as it has room."""
        self._grow()
        for expert_id, read in list(self.coming.items()):
            if read.urgency != WARM or not read.arrived:
                continue
            if len(self.cache) < self.cache.slots and read.error is None:
                self._add(expert_id)
            else:
                self.drop(expert_id)

    def _add(self, expert_id: int) -> None:
        """Admit an arrived expert into free room."""
        del self.coming[expert_id]
        self.cache.add(expert_id)
        self._set_slot(expert_id, self.table.slot_of[expert_id])

    def fill(self, expert_ids: Iterable[int], done: Callable[[], None]) -> None:
        """Read experts that are not cached into the cache's free room, several at a time, and wait;
        ``done()`` after each."""
        self._finish_growing()
        for expert_id in list(self.coming):
            self.drop(expert_id)
        absent = [id for id in expert_ids if id not in self.cache]

        def begin(expert_id: int) -> Read:
            return self.demand([expert_id], pinned=self.coming)[0]

        for read in self._source.read_each(absent[: self.room()], self.staging, begin):
            self.take([read])
            self._add(read.expert_id)
            done()

    def _begin(self, expert_id: int, urgency: int, pinned: Collection[int]) -> Read:
        if self.abandoned or not (self.table.free or self.table.left):
            self._make_room(pinned)
        slot, present = self.table.acquire(expert_id)
        self.reclaimed += present
        if present:
            read = Read(expert_id, memoryview(b""), urgency, done=True)
        else:
            read = self._source.read(expert_id, self.table.records[slot], urgency)
        self.table.slot_of[expert_id] = slot
        self.coming[expert_id] = read
        return read

    def _make_room(self, pinned: Collection[int]) -> None:
        """If no slot is free, the oldest prefetch that is not pinned gives its own up."""
        self._collect()
        while not (self.table.free or self.table.left):
            unwanted = next((id for id in self.coming if id not in pinned), None)
            if unwanted is not None:
                self.drop(unwanted)
            else:
                self._source.wait([read for read, _ in self.abandoned])
            self._collect()

    def _collect(self) -> None:
        waiting = []
        for read, slot in self.abandoned:  # each is asked once: it may be done at any moment
            if read.done:
                self.table.free.append(slot)
            else:
                waiting.append((read, slot))
        self.abandoned = waiting

    def close(self) -> None:
        """Stop what still goes on in other threads; the source is closed by itself."""
        if self._touching is not None:
            self._touching.close()
