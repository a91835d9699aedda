"""What becomes of an expert slot, from one read to the next, and where its records come from.

    ExpertStore   expert slots, on the device or in RAM below it
      | read(expert_id, slot, urgency) -> Read
    DiskReader    threads with several aligned direct reads in flight
    HostTier      below a GPU: the same, through slots in page-locked RAM

An expert id is (MoE layer index) * n_routed_experts + expert.  A slot is

    FREE      holds nothing that counts
    STALE     holds a record that was evicted, not admitted or given up: it may be taken back until
              the slot is needed for another; the least worth is overwritten first
    READING   takes a record that is on its way
    ARRIVED   holds a whole record that the cache has not judged yet
    LEAVING   was given up while pieces of its record still arrive
    CACHED    holds a record that the cache keeps

    FREE, STALE -- take --> READING -- arrived --> ARRIVED -- admit --> CACHED or STALE
    STALE ------- take, of the expert itself ----> ARRIVED      CACHED -- evicted --> STALE
    READING, ARRIVED -- give_up --> STALE if the record is there, else LEAVING, then FREE

What always holds, since ``move`` changes all that follows from a state:

- A slot that is FREE or STALE is ``available``; one that is READING, ARRIVED or LEAVING is
  ``staged``; so each is in one of these or CACHED, and none is lost.
- ``of`` has the slot of each expert with a record here or on its way: the CACHED or STALE one,
  else the one taken last.  No expert has two of these.
- The policy's ``cached``, and the entries of ``table_ME`` that are not -1, are the CACHED slots.
- The cache does not evict an expert that is held.
"""

from bisect import insort_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter

import torch

from slotmoe.offload.devices.device import Event, Region
from slotmoe.offload.policy.cache import Array, Cache

# Urgencies: the highest, then those of prefetches, layers until their use, and of what fills slots.
DEMAND, FILL = 0, 1 << 30
_NOTHING = memoryview(b"")


@dataclass(eq=False, slots=True)
class Read:
    """One record on its way into memory.  ``done`` is True when it can be used or when ``error``
    says why not; on a GPU kernels can use it that wait for ``copy`` first, None once they do."""

    expert_id: int
    urgency: int
    buffer: memoryview = _NOTHING
    # Called once in the reading thread, before ``done``; False: the read failed or was given up.
    after: Callable[[bool], None] | None = None
    taken: int = 0  # bytes given to readers
    outstanding: int = 0  # pieces being read
    done: bool = False
    cancelled: bool = False
    error: Exception | None = None
    copy: Event | None = None

    @property
    def arrived(self) -> bool:
        """Whether it is done, and so is its copy."""
        return self.done and (self.copy is None or self.copy.done())


class SlotState(IntEnum):
    """Of a slot; in an order in which what is available, and what is staged, stand together."""

    FREE, STALE, READING, ARRIVED, LEAVING, CACHED = range(6)


FREE, STALE, READING, ARRIVED, LEAVING, CACHED = SlotState
_FIRST = 1 << 60  # the rank of what is FREE
_rank = attrgetter("rank")


@dataclass(eq=False, slots=True)
class Slot:
    """A row of the slab, ``record``.  ``read`` brings the record, or has brought it, as long as the
    cache does not keep it; its urgency is the slot's.  ``references`` counts uses of what is cached
    where several may go on at once.  Of what is available the highest ``rank`` is taken first."""

    index: int
    record: Region
    state: SlotState = FREE
    expert: int = -1
    read: Read | None = None
    references: int = 0
    rank: int = 0


class ExpertStore:
    """Slots in ``records``, cache.slots + staging of them; first ``ready`` are usable.

    ``cache`` decides which experts stay, at most ``cache.slots`` of them.  The other slots are for
    staging: they hold records on their way in, so that nothing is evicted before its successor has
    arrived, and a wrong prefetch costs no cached expert.
    """

    def __init__(self, cache: Cache, records: Sequence[Region], ready: int):
        self.cache = cache
        self.of: dict[int, Slot] = {}
        self.staged: dict[int, Slot] = {}  # by index, in the order in which they were taken
        self.available: list[Slot] = []  # by rank
        # Ranks that say what STALE records are worth; 0, and what is outside, says nothing.
        self._ranks = range(1, 1)
        # Experts that are in use, here or not.
        self.held_N = cache.held_N
        # The slot of each cached expert, -1 of the others, and how often that has changed.
        self.table_ME = torch.full((cache.layers, cache.experts), -1, dtype=torch.int32)
        self._table_N, self.changes = self.table_ME.view(-1).numpy(), 0
        self.leaving = 0  # slots
        self._filling = iter(range(0))
        self.slots: list[Slot] = []
        self.records = records
        self.grow(ready)

    def grow(self, ready: int) -> None:
        """The first ``ready`` slots can be used now."""
        if ready > len(self.slots):
            records = enumerate(self.records[len(self.slots) : ready], len(self.slots))
            new = [Slot(index, record, rank=_FIRST) for index, record in records]
            stale = sum(slot.state is STALE for slot in self.available)
            self.available[stale:stale] = reversed(new)
            self.slots += new

    def state(self, expert_id: int) -> SlotState:
        """Of an expert's slot; FREE where it has none."""
        slot = self.of.get(expert_id)
        return FREE if slot is None else slot.state

    def refer(self, slot: Slot, references: int) -> None:
        """So many more uses of what is cached, or fewer; with one it is held."""
        slot.references += references
        self.held_N[slot.expert] = slot.references > 0

    def take(self, expert_id: int) -> Slot:
        """Stage an available slot: ARRIVED if the expert's record is still in it, else READING."""
        slot = self.of.get(expert_id)
        if slot is not None and slot.state is STALE:
            self.move(slot, ARRIVED)
            return slot
        slot = self.available[-1]
        if slot.state is STALE:
            if slot.rank not in self._ranks:  # nothing that is ranked is left
                slot = self._by_worth()[-1]
            self._ranks = range(self._ranks.start, max(slot.rank, self._ranks.start))
            del self.of[slot.expert]
        slot.expert, slot.rank, slot.read = expert_id, 0, None
        self.of[expert_id] = slot
        self.move(slot, READING)
        return slot

    def admit(self, slot: Slot, must: bool = False) -> None:
        """A staged record was used: the cache keeps it, perhaps in place of another, or rejects it,
        which with ``must`` it may only where all that is cached is held."""
        evicted = self.cache.victim(slot.expert, must)
        if evicted == slot.expert:
            return self.move(slot, STALE)
        if evicted is not None:
            self.move(self.of[evicted], STALE)
        self.move(slot, CACHED)

    def exchange(self, new_N: Array, gone_N: Array) -> None:
        """Each of ``new_N``, none of them staged, is cached in the slot of one of ``gone_N``, into
        which the caller copies its record."""
        for expert_id, other in zip(new_N.tolist(), gone_N.tolist(), strict=True):
            if expert_id in self.of:
                self.move(self.of[expert_id], FREE)
            slot = self.of[expert_id] = self.of.pop(other)
            slot.expert = expert_id
        self._table_N[new_N], self._table_N[gone_N] = self._table_N[gone_N], -1
        self.changes += 1
        self.cache.exchange(new_N, gone_N)

    def give_up(self, slot: Slot, cancel: Callable[[Read], bool]) -> None:
        """A staged record is not wanted.  ``cancel(read)``: whether nothing writes there now."""
        read = slot.read
        if read is not None and read.arrived and read.error is None:
            self.move(slot, STALE)
        elif read is None or read.done or cancel(read):
            self.move(slot, FREE)
        else:
            self.move(slot, LEAVING)

    def full(self) -> bool:
        """Whether the cache has no room, or every expert."""
        return len(self.cache) >= min(self.cache.slots, len(self.held_N))

    def to_fill(self) -> int | None:
        """The next expert in order of layer that has no record here, if free room is left beside
        all that is staged: the staging slots stay free for who needs an expert."""
        if len(self.cache) + len(self.staged) >= self.cache.slots:
            return None
        for _ in range(2):
            for expert_id in self._filling:
                if self.state(expert_id) <= STALE:
                    return expert_id
            self._filling = iter(range(len(self.held_N)))  # some were given up
        return None

    def collect(self) -> None:
        """What was LEAVING is FREE as soon as nothing arrives in it."""
        if self.leaving:
            for slot in list(self.staged.values()):
                if slot.state is LEAVING and slot.read is not None and slot.read.done:
                    self.move(slot, FREE)

    def coming(self) -> list[tuple[Slot, Read]]:
        """What is staged and was not given up, the oldest first."""
        staged = self.staged.values()
        return [(slot, slot.read) for slot in staged if slot.state is not LEAVING and slot.read]

    def leaving_reads(self) -> list[Read]:
        """What still arrives in slots that were given up."""
        return [slot.read for slot in self.staged.values() if slot.state is LEAVING and slot.read]

    def rank(self) -> None:
        """Order what is STALE by its present worth, for those who take next."""
        if self.available and self.available[0].state is STALE:
            ranked = self._by_worth()
            self.available[: len(ranked)] = ranked
            first = self._ranks.start + len(self.slots)  # earlier ranks are less
            self._ranks = range(first, first + len(ranked))
            for rank, slot in zip(self._ranks, ranked, strict=True):
                slot.rank = rank

    def _by_worth(self) -> list[Slot]:
        """What is STALE, the least worth last."""
        stale = []
        for slot in self.available:
            if slot.state is FREE:
                break
            stale.append(slot.expert)
        return [self.of[expert_id] for expert_id in self.cache.by_worth(stale)]

    def move(self, slot: Slot, state: SlotState) -> None:
        """The one place where a state changes, and with it all that follows from it."""
        before, expert_id, slot.state = slot.state, slot.expert, state
        if before is CACHED:
            self.cache.remove(expert_id)
            self._table_N[expert_id], self.changes = -1, self.changes + 1
        elif before > STALE:
            if state is not ARRIVED and state is not LEAVING:
                del self.staged[slot.index]
            self.leaving -= before is LEAVING
        elif self.available[-1] is slot:
            self.available.pop()
        else:
            self.available.remove(slot)
        if state is CACHED or state is STALE:
            known = self.of.get(expert_id)
            if known is not slot:
                if known is not None and known.state is STALE:
                    self.move(known, FREE)  # the host tier may read a record twice at once
                self.of[expert_id] = slot
            if state is CACHED:
                slot.read = None
                self.cache.add(expert_id)
                self._table_N[expert_id], self.changes = slot.index, self.changes + 1
            else:
                slot.rank = slot.rank if slot.rank in self._ranks else 0
                insort_left(self.available, slot, key=_rank)
            return
        if state is FREE or state is LEAVING:
            if self.of.get(expert_id) is slot:
                del self.of[expert_id]
            if state is FREE:
                slot.rank, slot.read = _FIRST, None
                self.available.append(slot)
                return
            self.leaving += 1
        self.staged[slot.index] = slot
