"""What goes over the link to a GPU, and when: small tensors never wait for records, copies begin
soon after the gate, measurements take no memory of their own.  The twin asserts of each small
tensor that no copy engine is asked; here its clocks are read.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slotmoe.offload.observe.measure import link_bandwidths
from slotmoe.offload.policy.cache import Cache, Learned
from slotmoe.offload.tiers.disk import DEMAND
from slotmoe.offload.tiers.memory import page_aligned
from tests.support.disk import forked
from tests.support.engine import IDS, start, whole
from tests.support.twin import COMPUTE, COPY, Twin, TwinDownload, measured

LAYERS, TOKENS = 7, IDS[1:5]
RATES = measured(pcie_busy=1 / COPY, experts=1 / COMPUTE)


@pytest.fixture
def decode(on_twin):
    """Decodes a few tokens by the clocks of a twin; ``meanwhile`` is called before they begin."""

    def run(twin, mode, prefetch=False, meanwhile=lambda: None):
        options = {"slots": 60, "prefetch": prefetch, "kernels": "torch"}
        with on_twin(twin, misses=mode, rates=RATES, **options) as runtime:
            twin.time_cpu(runtime.model.cpu)
            runtime.warm()
            step = start(runtime)
            step(IDS[:1])  # what was free when the pass began is in no order
            meanwhile()
            began = twin.now
            for one in TOKENS:
                step([one])
            return twin.now - began

    return run


def test_hybrid_is_faster_than_fetch_and_than_the_cpu(decode):
    """By clocks that are counted."""
    fetch, cpu, hybrid = (decode(Twin(), mode) for mode in ("fetch", "cpu", "hybrid"))
    assert hybrid < 0.9 * min(fetch, cpu)


def test_the_host_does_not_wait_for_what_is_read_ahead(decode, always_guessing):
    """The choice of experts comes by a kernel.  Behind the records in flight it would be late."""
    direct, queued = (
        decode(Twin(small_by_engine=by_engine), "hybrid", prefetch=True)
        for by_engine in (False, True)
    )
    assert queued > 1.02 * direct


def test_a_layer_with_misses_has_few_calls_and_one_wait_and_its_copies_wait_for_no_more(
    decode, monkeypatch
):
    """The choice comes to the host, the changed slot table and the table of what is late go to the
    GPU; hits and what is late are a launch each.  A token's id too goes there.  Between the choice
    and the copies behind it no policy learns or ranks, and of the device only points of the stream
    are asked for: by calls that wait for nothing a copy is soon queued."""
    twin, calls, before = Twin(), [], []

    def log(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def counts():
        return twin.syncs, twin.seams, twin.launches

    def begin():
        calls.clear()
        twin.gaps.clear()
        before[:] = counts()

    log(TwinDownload, "get")
    for name in ("copy", "record", "write", "download", "wait"):
        log(Twin, name)
    for name in ("use", "by_worth", "offer"):
        log(Cache, name)
    for name in ("use_chunk", "_worth_now"):
        log(Learned, name)
    decode(twin, "fetch", meanwhile=begin)
    syncs, seams, launches = (now - then for now, then in zip(counts(), before, strict=True))
    layers = len(TOKENS) * LAYERS
    assert syncs == layers
    assert seams <= 3 * layers + len(TOKENS)
    assert launches <= 2 * layers
    after = " ".join(calls).split("get ")[1:]
    copies = [layer.partition(" use")[0].split() for layer in after if "copy" in layer]
    assert len(copies) > 20
    for layer in copies:
        assert {*layer} == {"record", "copy"} and layer[:2] == ["record", "copy"]
    assert len(twin.gaps) > 20
    assert max(twin.gaps) <= 60e-6


@pytest.mark.parametrize("options", [{}, {"slots": 40}], ids=str)
def test_measuring_the_link_takes_no_memory_of_the_gpu_and_changes_no_record(on_twin, options):
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
        time.sleep(0.001)  # for others to come in, if they may
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


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells")
def test_a_child_process_has_no_copy_of_page_locked_ram(on_twin):
    """Else a write after a fork would move the page away from under a copy to the GPU."""
    assert "dc" not in flags_of(page_aligned(1 << 20))
    with on_twin(Twin(), 40, misses="fetch", slots=22) as runtime:
        slab = runtime.model.store.slab
        assert "dc" in flags_of(slab)

        def in_child():
            assert flags_of(slab[:0]) is None

        assert forked(in_child) == 0
