"""What goes over the link to a GPU, and when: small tensors never wait for records, copies begin
soon after the gate, measurements take no memory of their own.  The twin asserts of each small
tensor that no copy engine is asked.
"""

import faulthandler
import os
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.observe.measure import link_bandwidths
from slotmoe.offload.policy import prefetch
from tests.support import simulated, streams
from tests.support.disk import forked
from tests.support.engine import IDS, start, whole
from tests.support.twin import Twin

LAYERS, TOKENS = 7, IDS[1:5]
LATE = 2  # a seed of an adversary that runs nothing before the host waits for it


@pytest.mark.usefixtures("always_guessing")
@pytest.mark.parametrize(("computing", "guesses"), [(0.0, False), (20.0, True)])
def test_guesses_are_read_in_time_in_which_the_link_idles(on_twin, monkeypatch, computing, guesses):
    """By a clock of its own, on which a copy takes a second and a layer's experts ``computing``:
    while demands are copied from gate to gate, no guess is to stand before the next ones."""
    now, fill = [0.0], simulated.poison

    def copying(memory):
        fill(memory)
        now[0] += 1

    def on_launch(number):
        twin.gpu.put(twin.gpu.default, computed)

    def computed():
        now[0] += computing

    monkeypatch.setattr(streams, "clock", lambda: now[0])
    monkeypatch.setattr(simulated, "poison", copying)
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    twin = Twin(LATE)
    twin.on_launch = on_launch
    with on_twin(twin, misses="fetch", slots=22) as runtime:
        step = start(runtime)
        for id in IDS[:8]:
            step([id])
        read = runtime.stats()["prefetch"]
    total = sum(read[horizon][how] for horizon in read for how in ("used", "wasted", "cancelled"))
    assert (total > 0) == guesses


@pytest.mark.parametrize("options", [{}, {"slots": 40}], ids=str)
def test_measuring_the_link_takes_no_memory_of_the_gpu_and_changes_no_record(on_twin, options):
    twin = Twin()
    with on_twin(twin, misses="fetch", **options) as runtime:
        runtime.warm()
        slab, before = runtime.model.experts.slots.slab, twin.gpu.peak
        held = slab.clone()
        assert link_bandwidths(runtime.model)["pcie"] > 0
        assert twin.gpu.peak == before
        assert torch.equal(slab, held)
        whole(runtime)


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps memory from children")
def test_a_child_process_has_no_copy_of_page_locked_ram(on_twin):
    """Else a write after a fork would move the page away from under a copy to the GPU."""
    common = page_aligned(1 << 20)
    with on_twin(Twin(), 40, misses="fetch", slots=22) as runtime:
        slab = runtime.model.store.slab
        for memory, end in ((common, 0), (slab, -signal.SIGSEGV)):
            assert os.waitstatus_to_exitcode(forked(partial(quiet_read, memory))) == end


def quiet_read(memory):
    faulthandler.disable()
    bytes(memory.view(-1)[:1].numpy())
