"""The device store and the lookahead in any order of events: the right bytes in each slot, no slot
lost or used twice, none kept by a pass that has ended."""

from random import Random
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slotmoe.model.names import GATE, POST_NORM, layer_tensor
from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.ahead import HORIZONS, Lookahead
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import ARRIVED, CACHED, DEMAND, FILL, LEAVING, READING, STALE
from slotmoe.offload.policy.cache import make_cache
from slotmoe.quant.backends.base import TorchBackend
from tests.support import states
from tests.support.engine import sound
from tests.support.states import Broken, Disk

ROWS, EXPERTS, CHOSEN, BYTES = 3, 4, 2, Disk.record_bytes
ROW, EXPERT = st.integers(0, ROWS - 1), st.integers(0, EXPERTS - 1)
WHICH = st.integers(0, 7)  # of several reads
CONFIG = SimpleNamespace(
    moe_layers=range(ROWS),
    n_routed_experts=EXPERTS,
    num_experts_per_tok=CHOSEN,
    num_hash_layers=0,
    mtp=False,
)
WEIGHTS = {
    layer_tensor(row, name): torch.ones(1) for row in range(ROWS) for name in (POST_NORM, GATE)
}


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
        self.store, self.uses = self.slots.store, 0
        self.slots.slab.tensor.fill_(255)
        device = Device()
        given = CONFIG, WEIGHTS, TorchBackend(), BYTES, self.slots
        self.lookahead = Lookahead(*given, bandwidth=lambda: 1e18, download=device.download)
        self.lookahead.idle()
        self.lookahead.chosen(1, (), 0)  # the disk has idled: guesses are read from now on
        self.begin()

    @rule()
    def begin(self):
        """A pass."""
        self.slots.advance(1)
        self.lookahead.begin()

    @rule()
    def rank(self):
        self.store.rank()

    @precondition(lambda self: not self.store.staged)
    @rule(most=st.integers(1, 3))
    def exchange(self, most):
        """Records are copied into slots of others."""
        store, cached = self.store, sorted(self.slots.cache.cached)
        pairs = [*zip({*range(ROWS * EXPERTS)}.difference(cached), cached, strict=False)][:most]
        for new, gone in pairs:
            store.of[gone].record.tensor.fill_(new + 1)
        store.exchange(*np.array(pairs, int).reshape(-1, 2).T)

    @rule()
    def fill(self):
        """What fills free slots goes on, or meets a read that failed and stops."""
        errors = [s.read.error for s, read in self.store.coming() if read.urgency == FILL]
        try:
            full = self.slots._fill_free() is None
            left = [read for _, read in self.store.coming() if read.urgency == FILL]
            whole = len(self.slots.cache) == min(self.slots.planned, ROWS * EXPERTS)
            assert full == (whole and not left)
        except Broken:
            assert any(errors)

    @rule()
    def admit_guesses(self):
        """Those that have arrived."""
        self.slots.admit_guesses()

    @rule(row=ROW, experts=st.lists(EXPERT, unique=True), name=st.sampled_from(HORIZONS))
    def guess(self, row, experts, name):
        self.lookahead.guess(row, experts, name)
        self.lookahead.more(-1)

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
        self.disk.failing = {breaks} & {"read", "submit"}
        failed, staged = self.disk.errors, self.store.staged
        try:
            self.compute(row, [row * EXPERTS + expert for expert in experts], breaks, pins)
        except Broken:
            assert breaks or self.disk.errors > failed or any(s.read.error for s in staged.values())
        finally:
            self.slots.release()
            self.disk.failing.clear()
        assert not self.store.held_N.any()
        assert all(slot.state is LEAVING or slot.read.urgency != DEMAND for slot in staged.values())

    def compute(self, row, chosen, breaks, pins):
        slots, store = self.slots, self.store
        missing = [id for id in chosen if store.state(id) is not CACHED]
        self.lookahead.chosen(row, chosen, len(missing))
        wrong = {*range(row * EXPERTS, (row + 1) * EXPERTS)}.difference(chosen)
        coming = {slot.expert for slot, read in store.coming() if read.urgency != FILL}
        assert not coming & wrong
        reads = slots.demand(missing)
        assert all(READING <= store.state(id) <= ARRIVED for id in missing)
        store.held_N[chosen] = True
        store.held_N[pins] = True
        slots.cache.use(np.array([[chosen]]))
        self.uses += len(chosen)
        self.right(*set(chosen).difference(missing))
        self.lookahead.idle()
        while reads:
            slots.wait(reads)
            done = [read for read in reads if read.done]
            slots.take(done)
            if breaks == "take":
                raise Broken
            self.right(*(read.expert_id for read in done))
            reads = [read for read in reads if not read.done]
        for expert_id in missing:
            slots.admit(expert_id)
            if breaks == "admit":
                raise Broken
        assert all(store.state(id) in (CACHED, STALE) for id in chosen)  # it may be taken back

    def right(self, *expert_ids):
        assert all((self.store.of[id].record.tensor == id + 1).all() for id in expert_ids)

    @invariant()
    def same(self):
        store, cache = self.store, self.slots.cache
        sound(store)
        assert cache.hits + cache.misses == self.uses
        for read in self.disk.begun:  # nobody else may have the slot that it writes to
            slot = store.slots[(self.disk.targets[read] - self.slots.slab.address) // BYTES]
            assert slot.read is read and slot.state in (READING, LEAVING)
        self.right(*(slot.expert for slot in store.slots if slot.state in (CACHED, STALE)))
        assert torch.equal(self.slots.slots_ME, store.table_ME)


def test_a_record_that_is_read_twice_at_once_is_kept_once():
    """As the host tier may.  And a guess outlives the layer before its own."""
    cache = make_cache("lru", CHOSEN, ROWS, EXPERTS)
    slots = Slots(Disk(Random(0)), cache, CHOSEN + 1, CHOSEN, BYTES, Device())
    assert slots.prefetch(EXPERTS, 1)
    slots.release()
    assert EXPERTS in slots
    for slot in (slots.store.take(0), slots.store.take(0)):
        slots.store.move(slot, STALE)
    sound(slots.store)


@states.SIZES
def test_orders_of_events(examples, steps, part):
    states.run(Engine, examples, steps)
