"""Cache, slots and prefetcher in any order of events, beside a model in plain Python: the same
experts cached, the same counts, the right bytes in each slot."""

import pytest
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
from slotmoe.offload.tiers.device import Device
from slotmoe.offload.tiers.disk import DEMAND, WARM, Read
from slotmoe.offload.tiers.slots import Slots

ROWS, EXPERTS, CHOSEN, BYTES = 3, 4, 2, 64
IDS = st.integers(0, ROWS * EXPERTS - 1)
ROW = st.integers(0, ROWS - 1)
EXPERT = st.integers(0, EXPERTS - 1)
WHICH = st.integers(0, 7)  # of several reads


class Broken(Exception):
    """What ends a pass."""


class Disk:
    """Reads that are done when the test says so; once ``begun`` a read can't be taken back."""

    def __init__(self, chance):
        self.chance, self.pending, self.begun, self.targets = chance, [], [], {}

    def read(self, expert_id, target, urgency):
        read = Read(expert_id, target.numpy().data, urgency)
        self.targets[read] = target.data_ptr()
        return read

    def submit(self, reads):
        assert not any(read.done for read in reads)  # what is there is not read
        self.pending += reads

    def promote(self, read):
        read.urgency = DEMAND

    def cancel(self, read):
        read.cancelled = True
        if read in self.begun:
            return read.done
        self.pending.remove(read)
        read.done = True
        return True

    def finish(self, read):
        for reads in (self.pending, self.begun):
            if read in reads:
                reads.remove(read)
        read.buffer[:] = bytes([read.expert_id + 1]) * BYTES
        read.done = True

    def wait(self, reads):
        assert reads
        if not any(read.done for read in reads):
            self.finish(self.chance.choice(list(reads)))

    def abandon(self):
        self.pending.clear()
        self.begun.clear()

    def advance(self, tokens):
        pass


class Model:
    """What should be, by expert ids alone: least recently used leaves the cache, and what has left
    or never got in stays in its free slot until that is needed, the least recently used least."""

    def __init__(self, slots, bypass, all_slots):
        self.slots, self.bypass, self.all_slots = slots, bypass, all_slots
        self.cached, self.coming, self.used, self.now = set(), {}, {}, 0
        self.left, self.abandoned, self.reclaimed = [], 0, 0
        self.counts = dict.fromkeys(("hits", "misses", "evictions", "bypassed"), 0)

    def use(self, ids):
        for expert_id in ids:
            self.used[expert_id] = self.now
            self.now += 1
        hits = sum(id in self.cached for id in ids)
        self.counts["hits"] += hits
        self.counts["misses"] += len(ids) - hits

    def take_slot(self, expert_id):
        """For a read that begins."""
        held = len(self.cached) + len(self.coming) + self.abandoned + len(self.left)
        if expert_id in self.left:
            self.left.remove(expert_id)
            self.reclaimed += 1
        elif held == self.all_slots:
            self.left.remove(min(self.left, key=lambda id: self.used.get(id, -1)))

    def drop(self, expert_id, read, begun):
        del self.coming[expert_id]
        if read.done and read.error is None:
            self.left.append(expert_id)
        self.abandoned += begun

    def demand(self, missing, reads, begun):
        """``reads`` are those on their way, of which some have ``begun``."""
        for expert_id in missing:
            if expert_id in reads and reads[expert_id].error is not None:
                self.drop(expert_id, reads[expert_id], False)
            if expert_id in self.coming:
                continue
            room = self.all_slots - len(self.cached)
            while len(self.coming) + self.abandoned == room:
                unwanted = next((id for id in self.coming if id not in missing), None)
                if unwanted is None:
                    self.abandoned -= 1  # it waits for one that nobody wants
                else:
                    self.drop(unwanted, reads[unwanted], reads[unwanted] in begun)
            self.take_slot(expert_id)
            self.coming[expert_id] = DEMAND

    def offer(self, expert_id, pinned):
        if len(self.cached) < self.slots:
            self.cached.add(expert_id)
            return
        others = sorted(self.cached.difference(pinned), key=lambda id: (self.used.get(id, -1), id))
        if not others or (
            self.bypass and self.used.get(others[0], -1) >= self.used.get(expert_id, -1)
        ):
            self.counts["bypassed"] += 1
            self.left.append(expert_id)
            return
        self.left.append(others[0])
        self.cached.remove(others[0])
        self.cached.add(expert_id)
        self.counts["evictions"] += 1


class Engine(RuleBasedStateMachine):
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
        self.slots.slab.fill_(255)
        self.prefetcher = Prefetcher(ROWS, EXPERTS, BYTES, self, lambda: 1e18)
        self.prefetcher.idle()
        self.prefetcher.chosen(1, (), 0)  # the disk has idled: guesses are read from now on
        self.model, self.inside = Model(slots, bypass, len(self.slots.slab)), False
        self.begin()

    # The target of the prefetcher's reads

    def __contains__(self, expert_id):
        return expert_id in self.slots

    def prefetch(self, expert_id, urgency):
        model = self.model
        model.abandoned = sum(not read.done for read, _ in self.slots.abandoned)
        wanted = len(model.coming) + model.abandoned + CHOSEN < self.slots.staging
        accepted = self.slots.prefetch(expert_id, urgency)
        assert accepted == wanted
        if accepted:
            model.take_slot(expert_id)
            model.coming[expert_id] = urgency
        return accepted

    def drop(self, expert_id):
        if expert_id in self.model.coming:
            read = self.slots.coming[expert_id]
            self.model.drop(expert_id, read, read in self.disk.begun)
        self.slots.drop(expert_id)

    # Events

    @rule()
    def begin(self):
        """A pass."""
        model, was_consistent = self.model, self.slots.consistent
        self.slots.recover()
        self.slots.consistent = False
        if not was_consistent:
            model.coming.clear()
            model.left.clear()
        reads = self.slots.coming.items()
        for expert_id, read in sorted(reads, key=lambda read: read[1].urgency == WARM):
            if read.urgency != WARM or read.done:
                if read.urgency == WARM and not read.error and len(model.cached) < model.slots:
                    del model.coming[expert_id]
                    model.cached.add(expert_id)
                else:
                    model.drop(expert_id, read, False)
        self.slots.advance(1)
        self.prefetcher.reset()

    @rule()
    def end(self):
        self.slots.consistent = True

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
    @rule(which=WHICH)
    def end_read(self, which):
        self.disk.finish(self.disk.begun[which % len(self.disk.begun)])

    @precondition(lambda self: self.disk.begun)
    @rule(which=WHICH)
    def fail(self, which):
        """A read that fails; a demand reads again."""
        read = self.disk.begun.pop(which % len(self.disk.begun))
        read.error, read.done = Broken("disk"), True

    @rule(
        row=ROW,
        experts=st.lists(EXPERT, min_size=CHOSEN, max_size=CHOSEN, unique=True),
        breaks=st.sampled_from([None, None, None, "demand", "take", "admit"]),
    )
    def layer(self, row, experts, breaks):
        """A gate chooses; ``breaks`` is where an exception ends the pass."""
        if self.slots.consistent:
            self.begin()
        try:
            self.compute(row, [row * EXPERTS + expert for expert in experts], breaks)
        except Broken:
            self.begin()

    def compute(self, row, chosen, breaks):
        slots, model = self.slots, self.model
        missing = [id for id in chosen if id not in model.cached]
        assert missing == [id for id in chosen if id not in slots.cache]
        self.prefetcher.chosen(row, chosen, len(missing))
        model.abandoned = sum(not read.done for read, _ in slots.abandoned)
        model.demand(missing, dict(slots.coming), list(self.disk.begun))
        reads = slots.demand(missing, pinned=missing)
        assert {*missing} <= slots.coming.keys()
        if breaks == "demand":
            raise Broken
        slots.cache.use_chunk(row, [[id % EXPERTS for id in chosen]])
        model.use(chosen)
        self.right(*set(chosen).difference(missing))
        self.prefetcher.idle()
        while reads:
            slots.wait(reads)
            done = [read for read in reads if read.done]
            slots.take(done)
            if breaks == "take":
                raise Broken
            self.right(*(read.expert_id for read in done))
            reads = [read for read in reads if not read.done]
        for expert_id in missing:
            slots.admit(expert_id, pinned=chosen)
            del model.coming[expert_id]
            model.offer(expert_id, chosen)
            if breaks == "admit":
                raise Broken

    def right(self, *expert_ids):
        for expert_id in expert_ids:
            assert (self.slots.slab[self.slots.slot(expert_id)] == expert_id + 1).all()

    # What always holds

    @invariant()
    def same(self):
        slots, cache, model = self.slots, self.slots.cache, self.model
        assert cache.cached == model.cached
        assert {name: getattr(cache, name) for name in model.counts} == model.counts
        assert list(slots.coming) == list(model.coming)
        assert list(slots.table.left) == model.left and slots.reclaimed == model.reclaimed
        assert slots.table.slot_of.keys() == model.cached | model.coming.keys()
        free = [*slots.table.free, *slots.table.left.values()]
        held = [*free, *slots.table.slot_of.values()]
        held += [slot for _, slot in slots.abandoned]
        assert sorted(held) == list(range(len(slots.slab)))
        for read in self.disk.begun:  # nobody else may have the slot that it writes to
            slot = (self.disk.targets[read] - slots.slab.data_ptr()) // BYTES
            owned = slots.coming.get(read.expert_id) is read and slots.slot(read.expert_id) == slot
            assert owned or slot not in {*free, *slots.table.slot_of.values()}
        for expert_id, slot in slots.table.left.items():
            assert (slots.slab[slot] == expert_id + 1).all()
        self.right(*model.cached)
        known = [slots.slot(id) if id in model.cached else -1 for id in range(ROWS * EXPERTS)]
        assert slots.slots_ME.flatten().tolist() == known


@pytest.mark.parametrize(
    ("examples", "steps", "part"),
    [(12, 60, 0), *(pytest.param(200, 200, part, marks=pytest.mark.slow) for part in range(5))],
)
def test_orders_of_events(examples, steps, part):
    """A few that stay the same; nightly a thousand, of which each part makes up others."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        derandomize=examples < 100,
    )
    run_state_machine_as_test(Engine, settings=chosen)
