"""The engine that moves experts: invariant 1 over all its settings, faults while it runs, and its
parts alone."""

import ctypes
import os
import shutil
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch

from slotmoe.errors import ExportError
from slotmoe.offload.devices.pages import TOUCHED_AT_ONCE, Touching, page_aligned
from slotmoe.offload.experts import slots as store
from slotmoe.offload.experts.disk import DiskReader
from slotmoe.offload.experts.store import DEMAND
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import layer_file
from slotmoe.quant.export.reader import Export
from tests.support.engine import IDS, PROMPT, start, until, whole


@pytest.fixture(scope="module")
def wanted(sample_export):
    """Logits and greedy ids with every expert in memory."""
    with Runtime.open(sample_export, context=256) as runtime:
        return runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 20)]


@pytest.fixture
def opened(sample_export, always_guessing):
    return partial(Runtime.open, sample_export, context=256)


# Faults


def late(where, count):
    time.sleep(0.001 * (where[1] % 4))


def flaky(where, count):
    if where[1] % 10 == 1 and count == 1:
        raise ExportError("flaky")


def flipped(where, count):
    return count == 1 and where[1] % 9 == 0


FAULTS = {  # what reads of (layer, expert) do, the count-th time; whether any is repeated
    "late": (late, False, None),
    "fail once": (flaky, True, None),
    "wrong once": (flipped, True, None),
    "fail": (None, True, r"layer-\d+.*reading layer \d expert \d+ failed \(Input/output error\)"),
    "wrong": (lambda *_: True, True, "checksum of layer"),
}


@pytest.mark.parametrize(("fault", "repeats", "refused"), FAULTS.values(), ids=FAULTS)
def test_faulty_reads_change_nothing_or_stop_the_run(
    opened, wanted, monkeypatch, fault, repeats, refused
):
    """Reads come in parts.  What could not be read works later, and no slot is half-filled."""
    counts, begun, original, works = Counter(), [], os.preadv, Export.read_range

    def preadv(*given):
        if fault is None and begun:
            raise OSError(5, "Input/output error")
        return min(original(*given), 5000)

    def read_range(self, layer, expert, start, out, folder=0):
        counts[layer, expert] += 1
        is_wrong = fault is not None and fault((layer, expert), counts[layer, expert])
        works(self, layer, expert, start, out)
        out[100] ^= bool(is_wrong)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(Export, "read_range", read_range)
    with opened(slots=22) as runtime:
        begun.append(runtime)
        if refused:
            with pytest.raises(ExportError, match=refused):
                runtime.logits(IDS)
            whole(runtime)
            begun.clear()
            monkeypatch.setattr(Export, "read_range", works)
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert (runtime.stats()["io"]["disk"]["retries"] > 0) == repeats
        whole(runtime)


def test_files_that_change_while_they_are_read(sample_export, wanted, tmp_path):
    """The open handles go on reading replaced and removed files as they were verified; truncated
    ones are refused."""
    export = shutil.copytree(sample_export, tmp_path / "export")
    with Runtime.open(export, context=256, slots=22) as runtime:
        (export / "noise").write_bytes(os.urandom((export / layer_file(1)).stat().st_size))
        os.replace(export / "noise", export / layer_file(1))
        (export / layer_file(2)).unlink()
        assert torch.equal(runtime.logits(IDS), wanted[0])
        for layer in range(3, 8):
            os.truncate(export / layer_file(layer), 40960)
        with pytest.raises(ExportError, match="truncated while in use"):
            runtime.logits(IDS)
        whole(runtime)


def test_a_file_system_without_direct_reads_is_said_once(opened, wanted, monkeypatch, caplog):
    monkeypatch.setattr(Export, "bypass_page_cache", lambda self: False)
    with opened(slots=22) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert not runtime.stats()["io"]["disk"]["direct"]
    (record,) = caplog.records
    assert "direct reads" in record.message


# The parts alone: reads


@pytest.fixture
def reader(sample_export):
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False)
        yield reader
        reader.close()


@pytest.fixture
def gated(sample_export, monkeypatch):
    """A reader with one thread; ``let(n)`` lets n reads pass a gate, where ``calls`` wait; and
    prefetches of the first experts, so many as asked for, of which the first is at the gate."""
    gate, calls, original = threading.Semaphore(0), [], Export.read_range

    def read_range(self, layer, expert, *given):
        calls.append((layer, expert))
        gate.acquire()
        original(self, layer, expert, *given)

    monkeypatch.setattr(Export, "read_range", read_range)
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False, threads=1)
        reader._helps = False  # as for large records: the caller waits

        def ahead(count):
            queued = [reader.read(id, empty_record(reader), 1) for id in range(count)]
            reader.submit(queued)
            until(lambda: calls)
            return queued

        yield reader, gate.release, calls, ahead
        gate.release(1000)
        reader.close()


def empty_record(reader):
    return torch.zeros(reader.record_bytes, dtype=torch.uint8)


def test_demands_overtake_prefetches_and_cancelled_reads_never_start(gated):
    reader, let, calls, ahead = gated
    queued = ahead(4)
    demand = reader.read(9, empty_record(reader), DEMAND)
    reader.submit([demand])
    assert reader.cancel(queued[1])
    assert not reader.cancel(queued[0])  # its bytes are arriving
    reader.promote(queued[3])
    let(4)
    while waiting := [read for read in [demand, *queued] if not read.done]:
        reader.wait(waiting)
    assert [expert for _, expert in calls] == [0, 9, 3, 2]
    assert [read.error for read in [demand, *queued]] == [None] * 5


def test_closing_gives_up_what_is_queued(gated, caplog):
    reader, let, calls, ahead = gated
    queued = ahead(4)
    closing = threading.Thread(target=reader.close)
    closing.start()
    until(lambda: queued[3].done)  # else the reader may begin the next one first
    let()
    closing.join()
    assert not caplog.records  # no thread was left behind
    assert (calls, reader.retries) == ([(1, 0)], 0)


# Slots


class Pages:
    """A twin of ``Touching`` whose pages come when the test says so."""

    def __init__(self, memory, start):
        self.memory, self.ready = memory, start

    def finish(self):
        self.ready = len(self.memory)


@pytest.mark.parametrize("planned", [60, 7 * 32])
def test_slots_grow_with_their_pages_and_results_stay_the_same(
    opened, wanted, monkeypatch, planned
):
    monkeypatch.setattr(store, "LAZY_BYTES", 0)
    monkeypatch.setattr(store, "Touching", Pages)
    with opened(slots=planned) as runtime:
        slots, size = runtime.model.experts.slots, runtime.plan.record_bytes
        touching = slots._touching
        assert (slots.cache.slots, slots.planned) == (6, planned)
        step, rows = start(runtime), []
        for id in IDS:
            rows.append(step([id]))
            assert len(slots.cache) <= slots.cache.slots <= planned
            touching.ready += size * planned // 90
        assert slots.memory().nbytes == slots.slab.nbytes  # waits for the last page
        assert slots._touching is None and len(slots.cache) < planned
        runtime.warm()
        assert len(slots.cache) == slots.cache.slots == planned and slots._touching is None
        whole(runtime)
        assert torch.equal(torch.cat(rows), wanted[0])


def test_closing_stops_the_thread_that_gets_pages(monkeypatch):
    began, closing, original = threading.Event(), [], ctypes.memset

    def memset(*arguments):
        began.set()
        until(lambda: closing and closing[0]._stop)
        return original(*arguments)

    memory = page_aligned(3 * TOUCHED_AT_ONCE)
    monkeypatch.setattr(ctypes, "memset", memset)
    closing.append(Touching(memory, 4096))
    assert began.wait(30)
    closing[0].close()
    assert closing[0].ready == 4096 + TOUCHED_AT_ONCE
    assert "slotmoe-touch" not in [thread.name for thread in threading.enumerate()]
