"""Stores of experts, the prefetcher and the host tier in any order of events, beside models in
plain Python: the same experts cached, the same counts, the right bytes in each slot."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.policy.prefetch import HORIZONS, Prefetcher
from slotmoe.offload.tiers import host
from slotmoe.offload.tiers.device import Device, Event
from slotmoe.offload.tiers.slots import Slots
from slotmoe.offload.tiers.source import DEMAND, WARM, Read
from slotmoe.offload.tiers.store import ARRIVED, CACHED, LEAVING, READING, STALE
from tests.support.engine import sound

ROWS, EXPERTS, CHOSEN, BYTES = 3, 4, 2, 64
IDS = st.integers(0, ROWS * EXPERTS - 1)
ROW = st.integers(0, ROWS - 1)
EXPERT = st.integers(0, EXPERTS - 1)
WHICH = st.integers(0, 7)  # of several reads


class Broken(Exception):
    """What ends a pass."""


def holds(record, expert_id):
    return bool((record == expert_id + 1).all())


class Disk:
    """Reads that are done when the test says so; once ``begun`` a read can't be taken back.  What
    is in ``failing`` raises the next time."""

    record_bytes = BYTES

    def __init__(self, chance):
        self.chance, self.pending, self.begun, self.targets = chance, [], [], {}
        self.failing = set()

    def _fail(self, name):
        if name in self.failing:
            self.failing.clear()
            raise Broken(name)

    def read(self, expert_id, target, urgency):
        self._fail("read")
        read = Read(expert_id, target.numpy().data, urgency)
        self.targets[read] = target.data_ptr()
        return read

    def submit(self, reads):
        self._fail("submit")
        self.pending += [read for read in reads if not read.done]

    def promote(self, read):
        read.urgency = DEMAND

    def cancel(self, read):
        read.cancelled = True
        if read in self.pending or read not in self.begun:
            self.end(read, False)
        return read.done

    def end(self, read, arrived):
        """It is done; ``arrived`` says how."""
        if read.done:
            return
        for reads in (self.pending, self.begun):
            if read in reads:
                reads.remove(read)
        if arrived:
            read.buffer[:] = bytes([read.expert_id + 1]) * BYTES
        elif not read.cancelled:
            read.error = Broken("disk")
        after, read.after = read.after, None
        if after is not None:
            after(arrived and not read.cancelled)
        read.done = True

    def wait(self, reads):
        assert reads
        if not any(read.done for read in reads):
            self.end(self.chance.choice(list(reads)), True)
        return [read for read in reads if read.done]

    def advance(self, tokens):
        """A disk remembers nothing."""

    def stop(self):
        """Nothing stops it."""

    def stats(self):
        return {}


class Model:
    """What should be, by expert ids alone: least recently used leaves the cache, and what has left
    or never got in stays in its free slot until that is needed, the least recently used least, by
    the latest ranking as far as it goes."""

    def __init__(self, slots, bypass, all_slots):
        self.slots, self.bypass, self.all_slots = slots, bypass, all_slots
        self.cached, self.coming, self.used, self.now = set(), {}, {}, 0
        self.left, self.ranked, self.leaving, self.reclaimed = [], [], 0, 0
        self.counts = dict.fromkeys(("hits", "misses", "evictions", "bypassed"), 0)

    def worth(self, expert_id):
        return self.used.get(expert_id, -1), expert_id

    def use(self, ids):
        for expert_id in ids:
            self.used[expert_id] = self.now
            self.now += 1
        hits = sum(id in self.cached for id in ids)
        self.counts["hits"] += hits
        self.counts["misses"] += len(ids) - hits

    def rank(self):
        self.ranked = sorted(self.left, key=self.worth, reverse=True)

    def take_slot(self, expert_id):
        """For a read that begins."""
        held = len(self.cached) + len(self.coming) + self.leaving + len(self.left)
        if expert_id in self.left:
            self.left.remove(expert_id)
            self.reclaimed += 1
        elif held == self.all_slots:
            while self.ranked:
                if (least := self.ranked.pop()) in self.left:
                    break
            else:
                least = min(self.left, key=self.worth)
            self.left.remove(least)
            return least
        return None

    def drop(self, expert_id, read, begun):
        del self.coming[expert_id]
        if read.done and read.error is None:
            self.left.append(expert_id)
        self.leaving += begun

    def offer(self, expert_id, pinned):
        if len(self.cached) < self.slots:
            self.cached.add(expert_id)
            return
        others = sorted(self.cached.difference(pinned), key=self.worth)
        if not others or (self.bypass and self.worth(others[0])[0] >= self.worth(expert_id)[0]):
            self.counts["bypassed"] += 1
            self.left.append(expert_id)
            return
        self.left.append(others[0])
        self.cached.remove(others[0])
        self.cached.add(expert_id)
        self.counts["evictions"] += 1


class Engine(RuleBasedStateMachine):
    """The device store, as a pass uses it."""

    @initialize(
        slots=st.integers(CHOSEN, 8),
        spare=st.integers(1, 3),
        bypass=st.booleans(),
        chance=st.randoms(),
    )
    def start(self, slots, spare, bypass, chance):
        self.disk = Disk(chance)
        cache = make_cache("lru", slots, ROWS, EXPERTS)
        cache.bypass = bypass
        self.slots = Slots(self.disk, cache, CHOSEN + spare, CHOSEN, BYTES, Device())
        self.store = self.slots.store
        self.slots.slab.fill_(255)
        self.prefetcher = Prefetcher(ROWS, EXPERTS, BYTES, self, lambda: 1e18)
        self.prefetcher.idle()
        self.prefetcher.chosen(1, (), 0)  # the disk has idled: guesses are read from now on
        self.model = Model(slots, bypass, len(self.slots.slab))
        self.begin()

    def reads(self):
        """What is on its way or has arrived, by expert."""
        staged = self.store.staged.values()
        return {slot.expert: slot.read for slot in staged if slot.state is not LEAVING}

    def count_leaving(self):
        staged = self.store.staged.values()
        self.model.leaving = sum(slot.state is LEAVING and not slot.read.done for slot in staged)

    # The target of the prefetcher's reads

    def __contains__(self, expert_id):
        return expert_id in self.slots

    def prefetch(self, expert_id, urgency):
        model = self.model
        self.count_leaving()
        wanted = len(model.coming) + model.leaving + CHOSEN < self.slots.staging
        accepted = self.slots.prefetch(expert_id, urgency)
        assert accepted == wanted
        if accepted:
            model.take_slot(expert_id)
            model.coming[expert_id] = urgency
        return accepted

    def drop(self, expert_id):
        self.forget(expert_id)
        self.slots.drop(expert_id)

    def forget(self, expert_id):
        """The model's ``drop``."""
        if expert_id in self.model.coming:
            read = self.reads()[expert_id]
            self.model.drop(expert_id, read, read in self.disk.begun)

    # Events

    @rule()
    def begin(self):
        """A pass."""
        model, reads = self.model, self.reads()
        for expert_id in [id for id, read in reads.items() if read.urgency != WARM]:
            self.forget(expert_id)
        for expert_id in [id for id in reads if id in model.coming and reads[id].done]:
            if not reads[expert_id].error and len(model.cached) < model.slots:
                del model.coming[expert_id]
                model.cached.add(expert_id)
            else:
                self.forget(expert_id)
        self.slots.advance(1)
        self.prefetcher.reset()

    @rule()
    def rank(self):
        self.store.rank()
        if self.model.left:
            self.model.rank()

    @rule(row=ROW, experts=st.lists(EXPERT, unique=True), name=st.sampled_from(HORIZONS))
    def guess(self, row, experts, name):
        self.prefetcher.guess(row, [row * EXPERTS + expert for expert in experts], name)
        self.prefetcher.more(-1)

    @rule(expert_id=IDS)
    def warm(self, expert_id):
        if expert_id not in self.slots:
            self.prefetch(expert_id, WARM)

    @precondition(lambda self: WARM in self.model.coming.values())
    @rule(which=WHICH)
    def cool(self, which):
        """What was to warm the cache is given up."""
        warm = [id for id, urgency in self.model.coming.items() if urgency == WARM]
        self.drop(warm[which % len(warm)])

    @precondition(lambda self: self.disk.pending)
    @rule(which=WHICH)
    def start_read(self, which):
        """From here on it can't be taken back."""
        pending = self.disk.pending
        self.disk.begun.append(pending.pop(which % len(pending)))

    @precondition(lambda self: self.disk.begun)
    @rule(which=WHICH, arrived=st.booleans())
    def end_read(self, which, arrived):
        """It arrives, or fails; a demand reads again."""
        self.disk.end(self.disk.begun[which % len(self.disk.begun)], arrived)

    @rule(
        row=ROW,
        experts=st.lists(EXPERT, min_size=CHOSEN, max_size=CHOSEN, unique=True),
        breaks=st.sampled_from([None, None, None, "read", "submit", "take", "admit"]),
        kept=st.none() | ROW,
    )
    def layer(self, row, experts, breaks, kept):
        """A gate chooses; ``breaks`` is where an exception ends the pass.  The experts of the row
        ``kept`` stay, if there is one."""
        pins = slice(0) if kept is None else slice(kept * EXPERTS, (kept + 1) * EXPERTS)
        try:
            self.compute(row, [row * EXPERTS + expert for expert in experts], breaks, pins)
        except Broken:
            assert breaks or self.disk.failing is not None
        finally:
            for expert_id in [id for id, urgency in self.model.coming.items() if urgency == DEMAND]:
                self.forget(expert_id)
            self.slots.release()
            self.disk.failing.clear()
        assert not self.store.held_N.any()
        assert all(read.urgency != DEMAND for read in self.reads().values())

    def compute(self, row, chosen, breaks, pins):
        slots, store, model = self.slots, self.store, self.model
        missing = [id for id in chosen if id not in model.cached]
        assert missing == [id for id in chosen if store.state(id) is not CACHED]
        self.prefetcher.chosen(row, chosen, len(missing))
        self.count_leaving()
        self.disk.failing = {breaks} & {"read", "submit"}
        self.demand(missing, breaks)
        reads = slots.demand(missing)
        assert all(READING <= store.state(id) <= ARRIVED for id in missing)
        store.hold(chosen)
        store.hold(pins)
        slots.cache.use_chunk(row, [[id % EXPERTS for id in chosen]])
        model.use(chosen)
        self.right(*set(chosen).difference(missing))
        self.prefetcher.idle()
        while reads:
            slots.wait(reads)
            done = [read for read in reads if read.done]
            self.take(done)
            if breaks == "take":
                raise Broken
            self.right(*(read.expert_id for read in done))
            reads = [read for read in reads if not read.done]
        for expert_id in missing:
            slots.admit(expert_id)
            del model.coming[expert_id]
            model.offer(expert_id, {*chosen, *range(ROWS * EXPERTS)[pins]})
            if breaks == "admit":
                raise Broken

    def take(self, reads):
        """One that failed in the meantime is given up."""
        failed = next((read for read in reads if read.error), None)
        try:
            self.slots.take(reads)
        except Broken:
            assert failed
            del self.model.coming[failed.expert_id]
            raise
        assert not failed

    def demand(self, missing, breaks):
        """What the model makes of ``Slots.demand``."""
        model, reads, begun = self.model, self.reads(), self.disk.begun
        for expert_id in missing:
            if expert_id in reads and reads[expert_id].error is not None:
                self.forget(expert_id)
            elif expert_id in model.coming:
                model.coming[expert_id] = DEMAND
        for expert_id in missing:
            if expert_id in model.coming:
                continue
            room = model.all_slots - len(model.cached)
            while len(model.coming) + model.leaving == room:
                unwanted = (id for id, urgency in model.coming.items() if urgency != DEMAND)
                if (unwanted := next(unwanted, None)) is None:
                    model.leaving -= 1  # it waits for one that nobody wants
                else:
                    model.drop(unwanted, reads[unwanted], reads[unwanted] in begun)
            is_left = expert_id in model.left
            model.take_slot(expert_id)
            if breaks == "read" and not is_left:
                return
            model.coming[expert_id] = DEMAND

    def right(self, *expert_ids):
        assert all(holds(self.store.of[id].record, id) for id in expert_ids)

    # What always holds

    @invariant()
    def same(self):
        store, cache, model = self.store, self.slots.cache, self.model
        sound(store)
        assert cache.cached == model.cached
        assert {name: getattr(cache, name) for name in model.counts} == model.counts
        assert list(self.reads()) == list(model.coming)
        left = {slot.expert for slot in store.available if slot.state is STALE}
        assert left == {*model.left} and self.slots.reclaimed == model.reclaimed
        assert store.of.keys() == model.cached | model.coming.keys() | left
        for read in self.disk.begun:  # nobody else may have the slot that it writes to
            slot = store.slots[(self.disk.targets[read] - self.slots.slab.data_ptr()) // BYTES]
            assert slot.read is read and slot.state in (READING, LEAVING)
        self.right(*model.cached, *left)
        assert torch.equal(self.slots.slots_ME, store.table_ME)


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


def page(count, forks):
    return torch.full((count,), 255, dtype=torch.uint8)


@pytest.mark.parametrize("machine", [Engine, Host])
@pytest.mark.parametrize(
    ("examples", "steps", "part"),
    [(12, 60, 0), *(pytest.param(200, 200, part, marks=pytest.mark.slow) for part in range(5))],
)
def test_orders_of_events(machine, examples, steps, part):
    """A few that stay the same; nightly a thousand, of which each part makes up others."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        derandomize=examples < 100,
    )
    run_state_machine_as_test(machine, settings=chosen)
