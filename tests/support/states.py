"""What property tests share: how many examples, and a disk that does what the test says."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from slotmoe.offload.experts.store import DEMAND, Read


class Broken(Exception):
    """What ends a pass."""


class Disk:
    """Reads that are done when the test says so; once ``begun`` a read can't be taken back.  What
    is in ``failing`` raises the next time."""

    record_bytes = 64

    def __init__(self, chance):
        self.chance, self.pending, self.begun, self.targets = chance, [], [], {}
        self.failing, self.errors = set(), 0

    def _fail(self, name):
        if name in self.failing:
            self.failing.clear()
            raise Broken(name)

    def read(self, expert_id, target, urgency):
        self._fail("read")
        read = Read(expert_id, urgency, target.tensor.numpy().data)
        self.targets[read] = target.address
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
            read.buffer[:] = bytes([read.expert_id + 1]) * self.record_bytes
        elif not read.cancelled:
            read.error = Broken("disk")
            self.errors += 1
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
