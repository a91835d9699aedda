"""What goes over the link to a GPU, and when: small tensors never wait for records, copies begin
soon after the gate, measurements take no memory of their own.  The twin asserts of each small
tensor that no copy engine is asked; here its clocks are read.
"""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slotmoe.offload import loading
from slotmoe.offload.observe.measure import link_bandwidths
from slotmoe.offload.policy.cache import Cache, Learned
from slotmoe.offload.tiers.disk import DEMAND
from slotmoe.offload.tiers.memory import page_aligned
from tests.support.engine import IDS, start, whole
from tests.support.timed import Rates, TimedTwin
from tests.support.twin import Twin, TwinDownload, measured

# V2 on PCIe 4 and 8 cores: records of 12.5 MB at 25 and at 20 GB/s.
V2 = Rates(copy=0.5e-3, compute=0.62e-3)


@pytest.fixture
def token_seconds(on_twin, monkeypatch):
    """Seconds of a decoded token by the twin's clocks, and the twin."""
    rates = measured(pcie_busy=1 / V2.copy, experts=1 / V2.compute)
    monkeypatch.setattr(loading, "stored_bandwidths", lambda path: rates)

    def run(mode, prefetch=False, **options):
        twin = TimedTwin(V2, **options)
        with on_twin(twin, misses=mode, slots=60, prefetch=prefetch, kernels="torch") as runtime:
            twin.cpu(runtime.model.cpu)
            runtime.warm()
            step = start(runtime)
            step(IDS[:1])
            began, twin.gaps, twin.idle = twin.now, [], 0.0
            twin.seams = twin.syncs = twin.launches = 0
            for one in IDS[1:5]:
                step([one])
            return (twin.now - began) / 4, twin

    return run


def test_hybrid_is_faster_than_fetch_and_than_the_cpu(token_seconds):
    """By clocks that are counted."""
    fetch, cpu, hybrid = (token_seconds(mode)[0] for mode in ("fetch", "cpu", "hybrid"))
    assert hybrid < 0.9 * min(fetch, cpu)


def test_the_host_does_not_wait_for_what_is_read_ahead(token_seconds, always_guessing):
    """The choice of experts comes by a kernel.  Behind the records in flight it would be late."""
    direct, queued = (
        token_seconds("hybrid", prefetch=True, small_by_engine=by_engine)[0]
        for by_engine in (False, True)
    )
    assert queued > 1.02 * direct


def test_the_first_copy_is_queued_soon_after_the_gates_choice(token_seconds):
    """Of calls that wait for nothing; what Python takes between them is not counted here."""
    _, twin = token_seconds("fetch")
    assert len(twin.gaps) > 20
    assert max(twin.gaps) <= 60e-6


def test_a_copy_waits_for_nothing_but_what_it_needs(on_twin, monkeypatch):
    """Between the choice of experts and the copies behind it no policy learns or ranks, and of the
    device only points of the stream are asked for."""
    twin, calls = Twin(), []

    def logged(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, names in (
        (TwinDownload, ["get"]),
        (Twin, ["copy", "record", "write", "download", "wait"]),
        (Cache, ["use", "by_worth", "offer"]),
        (Learned, ["use_chunk", "_worth_now"]),
    ):
        for name in names:
            logged(owner, name)
    with on_twin(twin, misses="fetch", slots=60, prefetch=False, kernels="torch") as runtime:
        runtime.warm()
        step = start(runtime)
        step(IDS[:1])  # what was free when the pass began is in no order
        calls.clear()
        for id in IDS[1:5]:
            step([id])
    after = " ".join(calls).split("get ")[1:]
    copies = [layer.partition(" use")[0].split() for layer in after if "copy" in layer]
    assert len(copies) > 20
    for layer in copies:
        assert {*layer} == {"record", "copy"} and layer[:2] == ["record", "copy"]


def test_a_layer_with_misses_has_few_calls_and_one_wait(token_seconds):
    """Of 4 tokens in 7 layers: the choice comes to the host, the changed slot table and the table
    of what is late go to the GPU; hits and what is late are a launch each.  A token's id too goes
    there."""
    _, twin = token_seconds("fetch")
    layers = 4 * 7
    assert twin.syncs == layers
    assert twin.seams <= 3 * layers + 4
    assert twin.launches <= 2 * layers


def test_measuring_the_link_takes_no_memory_of_the_gpu_and_changes_no_record(on_twin):
    for options in ({}, {"slots": 40}):
        twin = Twin()
        with on_twin(twin, misses="fetch", **options) as runtime:
            runtime.warm()
            slab, before = runtime.model.experts.slots.slab, twin.peak
            held = slab.clone()
            assert link_bandwidths(runtime.model)["pcie"] > 0
            assert twin.peak == before
            assert torch.equal(slab, held)
            whole(runtime)


def test_copies_are_queued_by_one_thread_at_a_time(on_twin, monkeypatch):
    """The events around a copy measure that copy alone."""
    inside, together, original = [], [], Twin.copy

    def copy(self, *arguments):
        together.extend(inside)
        inside.append(threading.get_ident())
        time.sleep(0.001)
        try:
            return original(self, *arguments)
        finally:
            inside.clear()

    monkeypatch.setattr(Twin, "copy", copy)
    with on_twin(Twin(), 0, misses="fetch", slots=40) as runtime:
        slots, store = runtime.model.experts.slots, runtime.model.store
        reads = [store.read(expert_id, slots.slab[expert_id], DEMAND) for expert_id in range(8)]
        with ThreadPoolExecutor(8) as threads:  # as the disk's, when records arrive together
            list(threads.map(lambda read: read.after(True), reads))
        assert all(read.copy is not None for read in reads)
    assert not together


def flags_of(memory):
    """The kernel's flags of the mapping that ``memory`` lies in."""
    address, held = memory.data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            held = begin <= address < end
        elif first == "VmFlags:" and held:
            return line.split()[1:]
    return None


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells")
def test_a_child_process_has_no_copy_of_page_locked_ram(on_twin):
    """Else a write after a fork would move the page away from under a copy to the GPU."""
    assert "dc" not in flags_of(page_aligned(1 << 20))
    with on_twin(Twin(), 40, misses="fetch", slots=22) as runtime:
        slab = runtime.model.store.slab
        assert "dc" in flags_of(slab)
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            assert pool.apply(flags_of, (slab[:0],)) is None
