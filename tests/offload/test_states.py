"""The device store and the prefetcher in any order of events, beside a model in plain Python: the
same experts cached, the same counts, the right bytes in each slot."""

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import ARRIVED, CACHED, DEMAND, LEAVING, READING, STALE
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.policy.prefetch import HORIZONS, Prefetcher
from tests.support import states
from tests.support.engine import sound
from tests.support.states import (
    BYTES,
    CHOSEN,
    EXPERT,
    EXPERTS,
    ROW,
    ROWS,
    WHICH,
    Broken,
    Disk,
    Model,
    holds,
)


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
        for expert_id in self.reads():
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
        store.held_N[chosen] = True
        store.held_N[pins] = True
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


@states.SIZES
def test_orders_of_events(examples, steps, part):
    states.run(Engine, examples, steps)
