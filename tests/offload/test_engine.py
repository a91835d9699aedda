"""The engine that moves experts: invariant 1 over all its settings, faults while it runs, and its
parts alone."""

import logging
import os
import shutil
import threading
import time

import psutil
import pytest
import torch

from slotmoe.errors import ExportError
from slotmoe.offload import loading
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.tiers import slots as store
from slotmoe.offload.tiers.device import Device
from slotmoe.offload.tiers.disk import DEMAND, WARM, DiskReader
from slotmoe.offload.tiers.memory import Touching, page_aligned
from slotmoe.offload.tiers.slots import Slots
from slotmoe.quant.export.layout import layer_file
from slotmoe.quant.export.reader import Export
from tests.support.engine import IDS, PROMPT, start, whole

MANY = [
    {"slots": 6},
    {"slots": 22},
    {"slots": 56, "prefetch": False},
    {"slots": 112},
    *({"slots": 30, "cache_policy": policy} for policy in POLICIES),
]


@pytest.fixture(scope="module")
def wanted(sample_export):
    """Logits and greedy ids with every expert in memory."""
    with Runtime.open(sample_export, context=256) as runtime:
        return runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 40)]


@pytest.fixture(autouse=True)
def always_guessing(request, monkeypatch):
    """The sample's records are too small to be read ahead; here they are nevertheless."""
    if "costs_more" not in request.node.name:
        monkeypatch.setattr(Prefetcher, "pays", lambda self: True)
    if "too_small" not in request.node.name:
        monkeypatch.setattr(loading, "HELP_BYTES", 0)


@pytest.mark.parametrize("options", MANY, ids=str)
def test_logits_and_text_are_bitwise_the_same_for_every_setting(sample_export, wanted, options):
    with Runtime.open(sample_export, context=256, **options) as runtime:
        assert runtime.plan.slots == options["slots"]
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert [token.id for token in runtime.generate(PROMPT, 40)] == wanted[1]
        stats = runtime.stats()
        assert stats["cache"]["misses"] > 0
        assert ("prefetch" in stats) == options.get("prefetch", True)
        whole(runtime)


# Faults


def failing(monkeypatch, fail):
    """Let ``fail(n)`` act before the n-th range is read."""
    original, calls, lock = Export.read_range, [], threading.Lock()

    def read_range(self, layer, expert, start, out, folder=0):
        with lock:
            calls.append((layer, expert))
            number = len(calls)
        fail(number)
        original(self, layer, expert, start, out)

    monkeypatch.setattr(Export, "read_range", read_range)
    return calls


def test_a_read_that_fails_once_is_repeated(sample_export, wanted, monkeypatch):
    def fail(number):
        if number % 10 == 1:
            raise ExportError("flaky")

    failing(monkeypatch, fail)
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert runtime.stats()["io"]["disk"]["retries"] > 0
        whole(runtime)


def test_a_disk_that_fails_stops_the_run_and_works_again_later(sample_export, wanted, monkeypatch):
    broken = True

    def fail(number):
        if broken and number > 20:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", _guarded(os.preadv, fail))
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        with pytest.raises(
            ExportError,
            match=r"layer-\d+.*reading layer \d expert \d+ failed \(Input/output error\)",
        ):
            runtime.logits(IDS)
        whole(runtime)
        broken = False
        assert torch.equal(runtime.logits(IDS), wanted[0])
        whole(runtime)


def _guarded(original, fail):
    calls = 0

    def preadv(handle, buffers, offset):
        nonlocal calls
        if len(buffers[0]) == 28672:  # a record, not a header or a tensor
            calls += 1
            fail(calls)
        return original(handle, buffers, offset)

    return preadv


def test_wrong_bytes_are_read_again_and_then_refused(sample_export, wanted, monkeypatch):
    flip = 1

    def read_range(self, layer, expert, start, out, folder=0):
        nonlocal flip
        original(self, layer, expert, start, out)
        if flip > 0:
            flip -= 1
            out[100] ^= 1

    original = Export.read_range
    monkeypatch.setattr(Export, "read_range", read_range)
    with Runtime.open(sample_export, context=256) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        flip = 10**9
    with Runtime.open(sample_export, context=256) as runtime:
        with pytest.raises(ExportError, match="checksum of layer"):
            runtime.logits(IDS)
        flip = 0
        assert torch.equal(
            runtime.logits(IDS), wanted[0]
        )  # nothing half-filled was taken from a slot


@pytest.mark.parametrize("most", [4096, 5000, 9000])
def test_short_reads_are_continued(sample_export, wanted, monkeypatch, most):
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: min(original(*arguments), most))
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        assert torch.equal(runtime.logits(IDS[:20]), wanted[0][:20])


@pytest.fixture
def own_export(sample_export, tmp_path):
    return shutil.copytree(sample_export, tmp_path / "export")


def test_a_file_truncated_while_running(own_export):
    with Runtime.open(own_export, context=256, slots=22) as runtime:
        for layer in range(1, 8):
            os.truncate(own_export / layer_file(layer), 40960)
        with pytest.raises(ExportError, match="truncated while in use"):
            runtime.logits(IDS)
        whole(runtime)


def test_files_replaced_or_removed_while_running(own_export, wanted):
    """The open handles go on reading the files that were verified."""
    with Runtime.open(own_export, context=256, slots=22) as runtime:
        noise = os.urandom((own_export / layer_file(1)).stat().st_size)
        (own_export / "noise").write_bytes(noise)
        os.replace(own_export / "noise", own_export / layer_file(1))
        (own_export / layer_file(2)).unlink()
        assert torch.equal(runtime.logits(IDS), wanted[0])


def test_a_slow_disk_changes_nothing_but_the_time(sample_export, wanted, monkeypatch):
    failing(monkeypatch, lambda number: time.sleep(0.001 * (number % 4)))
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        assert [token.id for token in runtime.generate(PROMPT, 10)] == wanted[1][:10]


@pytest.mark.parametrize("moment", [1, 2, 9, 30])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interrupted_in_the_middle_of_a_step(sample_export, wanted, monkeypatch, moment, kind):
    original, calls = Slots.wait, 0

    def wait(self, reads):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise kind("in the middle")
        original(self, reads)

    monkeypatch.setattr(Slots, "wait", wait)
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        with pytest.raises(kind):
            runtime.logits(IDS)
        whole(runtime)
        assert torch.equal(runtime.logits(IDS), wanted[0])
        calls = -1000
        step = start(runtime)
        step(IDS[:50])
        calls = moment - 2
        with pytest.raises(kind):
            [step([one]) for one in IDS[50:]]
        whole(runtime)
        assert torch.equal(runtime.logits(IDS), wanted[0])
        whole(runtime)


def test_two_runs_share_one_export(sample_export, wanted):
    with (
        Runtime.open(sample_export, context=256, slots=22) as one,
        Runtime.open(sample_export, context=256, slots=60) as other,
    ):
        pairs = zip(one.generate(PROMPT, 40), other.generate(PROMPT, 40), strict=True)
        assert [(a.id, b.id) for a, b in pairs] == [(token, token) for token in wanted[1]]


def _resources(expected=None):
    """Open files and threads; a thread that was joined may be seen for a moment longer, so
    ``expected`` has two seconds."""
    process, deadline = psutil.Process(), time.monotonic() + 2
    while (
        (found := (process.num_fds(), process.num_threads())) != expected
        and expected
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    return found


def open_run_close(export, times):
    for number in range(times):
        with Runtime.open(export, context=64, slots=(22, 224)[number % 2]) as runtime:
            start(runtime)(IDS[: 1 + number % 3])


def test_files_and_threads_are_given_back(sample_export):
    open_run_close(sample_export, 2)
    time.sleep(0.1)
    before = _resources()
    open_run_close(sample_export, 6)
    assert _resources(before) == before


@pytest.mark.usefixtures("nightly")
def test_files_and_threads_over_a_thousand_cycles(sample_export):
    open_run_close(sample_export, 2)
    time.sleep(0.1)
    before, memory = _resources(), psutil.Process().memory_info().rss
    open_run_close(sample_export, 1000)
    assert _resources(before) == before
    assert psutil.Process().memory_info().rss < memory + (64 << 20)


@pytest.mark.usefixtures("nightly")
def test_soak(sample_export):
    """20,000 tokens under random budgets and policies, bitwise those of the model in memory."""
    random = torch.Generator().manual_seed(11)

    def below(high):
        return int(torch.randint(high, (), generator=random))

    done = 0
    with Runtime.open(sample_export, context=512) as reference:
        while done < 20000:
            options = {
                "slots": 6 + below(219),
                "cache_policy": list(POLICIES)[below(len(POLICIES))],
                "prefetch": below(4) > 0,
            }
            with Runtime.open(sample_export, context=512, **options) as runtime:
                for _ in range(2):
                    ids = torch.randint(2, 4000, (400 + below(100),), generator=random).tolist()
                    cut = 1 + below(len(ids) // 2)
                    step, same = start(runtime), start(reference)
                    for part in [ids[:cut], *([one] for one in ids[cut:])]:
                        assert torch.equal(step(part), same(part)), options
                    done += len(ids)
                whole(runtime)


def test_a_file_system_without_direct_reads_is_said_once(
    sample_export, wanted, monkeypatch, caplog
):
    monkeypatch.setattr(Export, "bypass_page_cache", lambda self: False)
    with (
        caplog.at_level(logging.WARNING),
        Runtime.open(sample_export, context=256, slots=22) as runtime,
    ):
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert not runtime.stats()["io"]["disk"]["direct"]
    assert [record.message for record in caplog.records if "direct reads" in record.message] != []
    assert len(caplog.records) == 1


# The parts alone


class Gate:
    """Lets reads pass one at a time and remembers their order."""

    def __init__(self, monkeypatch):
        self.order, self._turn = [], threading.Semaphore(0)
        original = Export.read_range

        def read_range(export, layer, expert, start, out, folder=0):
            self._turn.acquire()
            self.order.append(expert)
            original(export, layer, expert, start, out)

        monkeypatch.setattr(Export, "read_range", read_range)

    def open(self, count=1):
        for _ in range(count):
            self._turn.release()


@pytest.fixture
def one_reader(sample_export, monkeypatch):
    """A reader with one thread, a gate before each read, and a function that makes a buffer."""
    gate = Gate(monkeypatch)
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False, threads=1)
        reader._helps = False  # as for large records: the caller waits
        yield reader, gate, lambda: torch.zeros(reader.record_bytes, dtype=torch.uint8)
        gate.open(1000)
        reader.close()


def _started(reader, read):
    deadline = time.monotonic() + 5
    while not read.taken and time.monotonic() < deadline:
        time.sleep(0.001)
    assert read.taken


def test_demands_overtake_prefetches_and_cancelled_reads_never_start(one_reader):
    reader, gate, buffer = one_reader
    ahead = [reader.read(key, buffer(), 1) for key in range(4)]
    reader.submit(ahead)
    _started(reader, ahead[0])
    demand = reader.read(9, buffer(), DEMAND)
    reader.submit([demand])
    assert reader.cancel(ahead[1])
    assert not reader.cancel(ahead[0])  # its bytes are arriving
    reader.promote(ahead[3])
    gate.open(4)
    while not all(read.done for read in [demand, *ahead]):
        reader.wait([read for read in [demand, *ahead] if not read.done])
    assert gate.order == [0, 9, 3, 2]
    assert [read.error for read in [demand, *ahead]] == [None] * 5


def test_bandwidth_is_known_at_every_moment(one_reader):
    reader, gate, buffer = one_reader
    assert reader.bandwidth() == 1e9
    reads = [reader.read(key, buffer(), 1) for key in range(2)]
    reader.submit(reads)
    _started(reader, reads[0])
    assert reader.bandwidth() == 1e9  # busy, but nothing has arrived
    gate.open()
    reader.wait([reads[0]])
    assert 0 < reader.bandwidth() < 1e9  # in the middle of its first busy time
    gate.open()
    reader.wait([reads[1]])
    assert 0 < reader.bandwidth() < 1e9


def test_closing_gives_up_what_is_queued(one_reader):
    reader, gate, buffer = one_reader
    reads = [reader.read(key, buffer(), 1) for key in range(4)]
    reader.submit(reads)
    _started(reader, reads[0])
    closing = threading.Thread(target=reader.close)
    closing.start()
    while not reads[3].done:  # else the reader may begin the next one first
        time.sleep(0.001)
    gate.open()
    closing.join(2)  # ``close`` itself gives a reader up after 5
    assert not closing.is_alive()
    assert gate.order == [0] and reader.retries == 0


def test_large_records_are_read_in_pieces(sample_export, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.tiers.disk.PIECE_BYTES", 8192)
    calls = failing(monkeypatch, lambda number: None)
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False, threads=3)
        out, plain = (torch.zeros(reader.record_bytes, dtype=torch.uint8) for _ in range(2))
        read = reader.read(37, out, DEMAND)
        reader.submit([read])
        reader.wait([read])
        reader.close()
        assert calls == [(2, 5)] * 4
        export.read_range(2, 5, 0, plain.numpy().data)
        assert torch.equal(out, plain)


class Shelf:
    """A target of prefetches that holds keys; room for ``room`` of them."""

    def __init__(self, room=100):
        self.keys, self.room, self.dropped = {}, room, []

    def prefetch(self, key, urgency):
        if len(self.keys) >= self.room:
            return False
        self.keys[key] = urgency
        return True

    def drop(self, key):
        del self.keys[key]
        self.dropped.append(key)

    def __contains__(self, key):
        return key in self.keys


def prefetcher(shelf, idle=1.0):
    """Three layers of ten experts, a disk of 100 records a second, and ``idle`` seconds a layer to
    read ahead."""
    made = Prefetcher(3, 10, 1, shelf, lambda: 100.0)
    made._idle.value = idle
    return made


def test_guesses_are_read_nearest_layer_first_and_judged_by_the_gate():
    shelf = Shelf()
    ahead = prefetcher(shelf)
    ahead.guess(1, [11, 12], "token")
    ahead.guess(2, [21], "token")
    ahead.more(0)
    assert shelf.keys == {11: 1, 12: 1, 21: 2}
    ahead.guess(1, [12, 13], "layer")  # the later word refutes 11
    assert shelf.dropped == [11]
    ahead.more(0)
    ahead.chosen(1, [12, 15], 2)
    assert shelf.dropped == [11, 13]
    assert ahead.stats()["token"]["cancelled"] == 1
    assert (ahead.stats()["token"]["used"], ahead.stats()["layer"]["wasted"]) == (1, 1)
    assert (
        ahead.stats()["layer"]["guessed"],
        ahead.stats()["layer"]["right"],
        ahead.stats()["layer"]["asked"],
    ) == (2, 1, 2)
    ahead.reset()
    ahead.chosen(2, [22], 1)
    assert shelf.dropped == [11, 13]  # 21 is forgotten


def test_what_is_here_already_is_not_read():
    shelf = Shelf()
    shelf.keys[11] = 0
    ahead = prefetcher(shelf)
    ahead.guess(1, [11, 12], "layer")
    ahead.more(0)
    ahead.chosen(1, [12], 0)
    assert shelf.dropped == []  # 11 is not the prefetcher's to drop
    assert ahead.stats()["layer"]["used"] == 1


def test_reads_ahead_are_limited_by_idle_time_and_accuracy():
    def begun(idle, right):
        shelf = Shelf()
        ahead = prefetcher(shelf, idle)
        ahead._right["layer"].value = right
        ahead.guess(1, range(10, 20), "layer")
        ahead.more(0)
        return len(shelf.keys)

    assert begun(0.0, 0.5) == 0
    assert begun(0.02, 0.0) == 2
    assert begun(0.02, 0.5) == 4
    assert begun(0.02, 0.75) == 8
    assert begun(1.0, 0.5) == 10


def test_guessing_stops_where_it_costs_more_than_it_hides():
    ahead = prefetcher(Shelf())
    ahead._missing.value = 2.0  # 20 ms of reads a layer
    ahead._cost.value = 0.0005
    assert ahead.pays()
    ahead._cost.value = 0.01
    asked = [ahead.pays() for _ in range(32)]
    assert sum(asked) == 2  # but looks again now and then


def test_records_too_small_to_wake_a_thread_are_not_read_ahead(sample_export):
    with Runtime.open(sample_export, context=64, slots=22) as runtime:
        assert "prefetch" not in runtime.stats()


def test_a_full_shelf_refuses_prefetches():
    shelf = Shelf(room=2)
    ahead = prefetcher(shelf)
    ahead.guess(1, range(10, 20), "layer")
    ahead.more(0)
    assert len(shelf.keys) == 2


def test_slots_keep_a_reserve_for_demands(sample_export):
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False)
        slots = Slots(reader, make_cache("lru", 8, 7, 32), 10, 6, reader.record_bytes, Device())
        assert [slots.prefetch(key, 1) for key in range(6)] == [True] * 4 + [False] * 2
        reads = slots.demand([40, 41, 42, 43, 44, 45, 1], pinned=[40, 41, 42, 43, 44, 45, 1])
        while pending := [read for read in reads if not read.done]:
            slots.wait(pending)
        assert 1 in slots
        for key in (40, 41, 42, 43, 44, 45, 1):
            slots.admit(key, pinned=())
        assert len(slots.cache) == 7
        assert 2 in slots  # a prefetch that nothing has pushed out
        reader.close()


class DoneBetweenTwoLooks:
    """A read that its thread ends right after it was first asked for."""

    looks = 0

    @property
    def done(self):
        self.looks += 1
        return self.looks > 1


def test_a_read_that_ends_while_slots_are_counted_loses_none():
    slots = Slots(None, make_cache("lru", 2, 7, 32), 3, 3, 8, Device())
    slots.abandoned.append((DoneBetweenTwoLooks(), slots.table.free.pop()))
    for _ in range(2):
        assert not slots.prefetch(5, 1)  # all staging slots are reserved
        assert len(slots.table.free) + len(slots.abandoned) == 5
    assert sorted(slots.table.free) == list(range(5))


def test_what_has_left_the_cache_is_taken_back_until_its_slot_is_needed(sample_export):
    """The least worth is overwritten first; what was read ahead in vain stays too."""
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False)
        slots = Slots(reader, make_cache("lru", 2, 7, 32), 3, 1, reader.record_bytes, Device())

        def use(*keys):
            reads = slots.demand(keys, pinned=keys)
            while pending := [read for read in reads if not read.done]:
                slots.wait(pending)
            for row in {key // 32 for key in keys}:
                slots.cache.use_chunk(row, [[key % 32 for key in keys if key // 32 == row]])
            for key in keys:
                slots.admit(key, pinned=keys)

        for key in (0, 1, 2, 3, 4):
            use(key)
        assert {*slots.table.left} == {0, 1, 2}
        before = reader.stats()["disk"]["bytes"]
        bytes_1 = slots.slab[slots.table.left[1]].clone()
        use(1)
        assert (reader.stats()["disk"]["bytes"], slots.reclaimed) == (before, 1)
        assert torch.equal(slots.slab[slots.slot(1)], bytes_1)
        assert slots.prefetch(40, 1)
        while not slots.coming[40].done:
            slots.wait([slots.coming[40]])
        slots.advance(1)  # nobody has asked for 40
        assert {*slots.table.left} == {2, 3, 40}  # 0 was used before all others
        before = reader.stats()["disk"]["bytes"]
        use(40)
        assert (reader.stats()["disk"]["bytes"], slots.reclaimed) == (before, 2)
        slots.consistent = False
        slots.recover()
        assert not slots.table.left  # what an interrupted step has left there is not trusted
        reader.close()


def test_what_was_read_to_warm_the_cache_moves_into_it_with_the_next_step(sample_export):
    with Export.open(sample_export) as export:
        reader = DiskReader(export, direct=False)
        slots = Slots(reader, make_cache("lru", 2, 7, 32), 10, 6, reader.record_bytes, Device())
        assert all(slots.prefetch(key, WARM) for key in (3, 4, 5))
        while pending := [read for read in slots.coming.values() if not read.done]:
            reader.wait(pending)
        slots.advance(1)
        assert (3 in slots.cache, 4 in slots.cache, 5 in slots) == (
            True,
            True,
            False,
        )  # there was room for two
        assert not slots.coming
        reader.close()


def test_popular_experts_fill_free_slots(sample_export, wanted):
    with Runtime.open(sample_export, context=256, slots=100) as runtime:
        runtime.model.experts._warm = [200, 201, 202]
        assert torch.equal(runtime.logits(IDS), wanted[0])
        step = start(runtime)
        for one in IDS:
            step([one])
        step([5])
        whole(runtime)
        assert not runtime.model.experts._warm
        assert (
            not runtime.model.experts.slots.coming
        )  # what was read to warm the cache holds no read buffer for ever


class Pages:
    """A twin of ``Touching`` whose pages come when the test says so."""

    def __init__(self, memory, start):
        self.memory, self.ready, self.closed = memory, start, False

    def come(self, count):
        self.ready = min(self.ready + count, len(self.memory))

    def finish(self):
        self.ready = len(self.memory)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("planned", [60, 7 * 32])
def test_slots_grow_with_their_pages_and_results_stay_the_same(
    sample_export, wanted, monkeypatch, planned
):
    monkeypatch.setattr(store, "LAZY_BYTES", 0)
    monkeypatch.setattr(store, "Touching", Pages)
    with Runtime.open(sample_export, context=256, slots=planned) as runtime:
        slots, size = runtime.model.experts.slots, runtime.plan.record_bytes
        pages = slots._touching
        assert (slots.cache.slots, slots.planned) == (6, planned)
        step, rows = start(runtime), []
        for one in IDS:
            rows.append(step([one]))
            assert len(slots.cache) <= slots.cache.slots <= planned
            pages.come(size * 9 // 2)
        pages.finish()
        rows.append(step([5]))
        whole(runtime)
        assert (slots.cache.slots, slots._touching) == (planned, None)
        assert len(slots.cache) == planned or planned == 7 * 32
        assert torch.equal(torch.stack(rows[:-1]).view(len(IDS), -1), wanted[0])


def test_filling_waits_for_the_last_page(sample_export, monkeypatch):
    monkeypatch.setattr(store, "LAZY_BYTES", 0)
    monkeypatch.setattr(store, "Touching", Pages)
    with Runtime.open(sample_export, context=64, slots=60) as runtime:
        runtime.warm()
        assert len(runtime.model.experts.slots.cache) == 60
        whole(runtime)


def test_closing_stops_the_thread_that_gets_pages():
    memory = page_aligned(1 << 30)
    touching = Touching(memory, 4096)
    while touching.ready == 4096:  # a busy machine starts it late
        time.sleep(0.001)
    touching.close()
    assert 4096 < touching.ready < len(memory)
    assert "slotmoe-touch" not in [thread.name for thread in threading.enumerate()]
    small = Touching(memory[: 50 << 20], 0)
    small.finish()
    assert small.ready == 50 << 20


def test_every_sequence_has_its_latents_in_pages_of_their_own(sample_export):
    """Large pages begin at multiples of 2 MiB, so memory that begins in the middle of a page gets
    fewer."""
    with Runtime.open(sample_export, context=256, sequences=2) as runtime:
        places = [cache.layers.data_ptr() for cache in runtime.model.caches]
    assert len(set(places)) == 2
    assert not any(place % 4096 for place in places)
