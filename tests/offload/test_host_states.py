"""The host tier in any order of events, beside a model in plain Python."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slotmoe.offload.devices.device import Device, Event
from slotmoe.offload.experts import host
from slotmoe.offload.experts.store import ARRIVED, CACHED, DEMAND, STALE
from slotmoe.offload.policy.cache import make_cache
from tests.support import states
from tests.support.engine import sound
from tests.support.states import BYTES, EXPERTS, ROWS, WHICH, Disk, Model, holds

IDS = st.integers(0, 5)  # few, so that many are cached


class Copies(Device):
    """A device whose copies are done when the test says so, in their order."""

    queues = True

    def __init__(self):
        self.copies, self.broken = [], False

    def copy(self, source, target, after):
        if self.broken:
            raise RuntimeError("no copy")
        self.copies.append(Copy(self, source, target))
        return self.copies[-1]


class Copy(Event):
    def __init__(self, device, source, target):
        self.device, self.source, self.target = device, source, target

    def done(self):
        return self not in self.device.copies

    def synchronize(self):
        while not self.done():
            oldest = self.device.copies.pop(0)
            oldest.target.copy_(oldest.source)


class Host(RuleBasedStateMachine):
    """The host tier, with a disk and a device that do what the test says.  In the model a use is of
    an expert that was cached when it began, or of one that is put back when it ends."""

    @initialize(slots=st.integers(1, 6), staging=st.integers(2, 4), chance=st.randoms())
    def start(self, slots, staging, chance):
        self.disk, self.device, self.staging = Disk(chance), Copies(), staging
        cache = make_cache("lru", slots, ROWS, EXPERTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "DiskReader", lambda *_: self.disk)
            patch.setattr(host, "page_aligned", page)
            self.tier = host.HostTier(Exported, False, cache, staging, self.device)
        self.model = Model(slots, False, slots + staging)
        self.forwarded, self.acquired, self.copied = {}, {}, []  # uses of the model

    def under_way(self):
        return len(self.acquired) + sum(not read.done for read in self.forwarded)

    def use(self, expert_id):
        """A use of the model begins: (expert, whether it was cached)."""
        self.collect()
        return expert_id, expert_id in self.model.cached

    def collect(self):
        """Uses whose copies are done end, in the order of the copies."""
        for read in [*self.copied]:
            if not read.copy.done():
                break
            self.copied.remove(read)
            self.end(self.forwarded.pop(read))

    def end(self, use):
        expert_id, was_cached = use
        if not was_cached and expert_id not in self.model.cached:
            self.model.offer(expert_id, self.pinned())

    def pinned(self):
        return {
            id
            for id, was_cached in [*self.forwarded.values(), *self.acquired.values()]
            if was_cached
        }

    def submit(self, read):
        self.tier.submit([read])
        self.collect()
        self.model.use([read.expert_id])

    # Events

    @precondition(lambda self: self.under_way() < self.staging)
    @rule(expert_id=IDS, urgency=st.sampled_from([DEMAND, 1]))
    def read(self, expert_id, urgency):
        """For a slot of the GPU."""
        target = torch.full((BYTES,), 255, dtype=torch.uint8)
        self.make_room(expert_id)
        use = self.use(expert_id)
        read = self.tier.read(expert_id, target, urgency)
        self.disk.targets[read] = target
        self.forwarded[read] = use
        self.note_copies()
        self.submit(read)

    @precondition(lambda self: self.under_way() < self.staging)
    @rule(expert_id=IDS)
    def acquire(self, expert_id):
        """For the CPU."""
        self.make_room(expert_id)
        use = self.use(expert_id)
        read = self.tier.acquire(expert_id)
        self.acquired[read] = use
        self.submit(read)

    def make_room(self, expert_id):
        """Where no slot is available the tier waits for the oldest copy, or for what was given up;
        here that is done before, so that the model need not foresee it."""
        self.tier.stats()
        self.collect()
        store = self.tier.store
        while not store.available and store.state(expert_id) is not CACHED:
            if self.device.copies:
                self.device.copies[0].synchronize()
            else:
                self.disk.wait(store.leaving_reads())
            self.tier.stats()
            self.collect()

    def note_copies(self):
        """Copies that were queued, and uses that ended without one."""
        known = {id(read) for read in self.copied}
        queued = [read for read in self.forwarded if read.copy and id(read) not in known]
        order = {id(copy): number for number, copy in enumerate(self.device.copies)}
        self.copied += sorted(queued, key=lambda read: order[id(read.copy)])
        for read in [read for read in self.forwarded if read.done and read.copy is None]:
            del self.forwarded[read]

    @precondition(lambda self: self.disk.pending)
    @rule(which=WHICH)
    def start_read(self, which):
        pending = self.disk.pending
        self.disk.begun.append(pending.pop(which % len(pending)))

    @precondition(lambda self: self.disk.begun)
    @rule(which=WHICH, arrived=st.booleans(), broken=st.booleans())
    def end_read(self, which, arrived, broken):
        """The record arrives, perhaps at a device that can't copy, or not."""
        read = self.disk.begun[which % len(self.disk.begun)]
        self.device.broken = broken
        self.disk.end(read, arrived)
        self.device.broken = False
        if read in self.forwarded:
            assert (read.copy is not None) == (arrived and not broken and not read.cancelled)
        self.note_copies()

    @precondition(lambda self: any(not read.done for read in self.forwarded))
    @rule(which=WHICH)
    def cancel(self, which):
        reads = [read for read in self.forwarded if not read.done]
        read = reads[which % len(reads)]
        assert self.tier.cancel(read) == (read not in self.disk.begun)
        self.note_copies()

    @precondition(lambda self: self.device.copies)
    @rule()
    def copy(self):
        self.device.copies[0].synchronize()

    @precondition(lambda self: self.acquired)
    @rule(which=WHICH)
    def release(self, which):
        """Computed, or given up; what has not arrived can't be cached."""
        read = [*self.acquired][which % len(self.acquired)]
        use = self.acquired.pop(read)
        if read.done and read.error is None:
            assert holds(self.tier.slab[self.tier.acquired[read].index], read.expert_id)
            self.end(use)
        self.tier.release(read)

    @rule()
    def settle(self):
        """All that is on its way arrives and is copied."""
        for read in [*self.disk.pending, *self.disk.begun]:
            self.disk.end(read, True)
            self.note_copies()
        while self.device.copies:
            self.device.copies[0].synchronize()

    @rule()
    def break_off(self):
        """A layer that was computing ends by an exception."""
        for read in [*self.acquired]:
            use = self.acquired.pop(read)
            if read.done and read.error is None:
                self.end(use)
        self.tier.release_all()

    @rule()
    def advance(self):
        self.tier.advance(1)
        self.collect()

    # What always holds

    @invariant()
    def same(self):
        self.tier.stats()
        self.collect()
        tier, model = self.tier, self.model
        sound(tier.store)
        cache = tier.cache
        assert cache.cached == model.cached
        assert {name: getattr(cache, name) for name in model.counts} == model.counts
        assert {*tier.store.held_N.nonzero()[0]} == self.pinned()
        for slot in tier.store.slots:
            if slot.state in (ARRIVED, CACHED, STALE):
                assert holds(slot.record, slot.expert)
        for read, target in self.disk.targets.items():
            if isinstance(target, torch.Tensor) and read.copy is not None and read.copy.done():
                assert holds(target, read.expert_id)


class Exported:
    """An export, as far as the host tier asks."""

    class layout:
        record_bytes = BYTES


def page(count, forks, nodes):
    return torch.full((count,), 255, dtype=torch.uint8)


@states.SIZES
def test_orders_of_events_below_a_gpu(examples, steps, part):
    states.run(Host, examples, steps)
