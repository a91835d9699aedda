"""What the property tests of stores of experts share: a disk that does what the test says, and a
model in plain Python."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from slotmoe.offload.experts.store import DEMAND, Read

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
        read = Read(expert_id, urgency, target.numpy().data)
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


SIZES = pytest.mark.parametrize(
    ("examples", "steps", "part"),
    [(12, 60, 0), *(pytest.param(200, 200, part, marks=pytest.mark.slow) for part in range(5))],
)
"""A few examples that stay the same; nightly a thousand, of which each part makes up others."""


def run(machine, examples, steps):
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        derandomize=examples < 100,
    )
    run_state_machine_as_test(machine, settings=chosen)
