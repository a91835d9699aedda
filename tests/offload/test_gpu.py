"""The engine on a GPU, through the twin: order of streams, budgets, split misses.  No GPU is
needed."""

import faulthandler
import os
import re
import signal
import sys
from functools import partial
from itertools import product
from pathlib import Path
from threading import Event

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.engine import loading
from slotmoe.offload.engine.passes import Row
from slotmoe.offload.experts import host
from slotmoe.offload.observe.measure import Lasting
from slotmoe.offload.plan.speed import MEASURED
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.runtime import Runtime
from slotmoe.signals import ENDING
from slotmoe.sizes import format_size
from slotmoe.tools.bench.speed import calibration, measure
from tests.support import simulated
from tests.support.disk import forked
from tests.support.engine import IDS, PROMPT, start, until, whole
from tests.support.params import nth
from tests.support.twin import EXPERTS, Twin, TwinBackend

pytestmark = pytest.mark.usefixtures("always_guessing")

SIZES = [{"slots": 3}, {"slots": 6}, {"slots": 12, "prefetch": False}, {"slots": 24}, {}]
SETTINGS = [*product(SIZES, (0, 10, EXPERTS))]
# More than the nine experts that a token cycles through, so that every policy hits.
SETTINGS += [({"slots": 7, "cache_policy": policy}, 13) for policy in POLICIES]


@pytest.mark.parametrize(("options", "host_slots"), nth(4, SETTINGS), ids=str)
def test_fetch_gives_the_same_bits_for_every_budget_and_policy(
    on_twin, wanted, options, host_slots
):
    twin = Twin(host_slots + len(str(options)))
    with on_twin(twin, host_slots, misses="fetch", **options) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        stats = runtime.stats()
        assert stats["misses"]["computed"] == 0
        assert stats["misses"]["fetched"] > 0
        assert (stats["io"]["host"]["hits"] > 0) == (host_slots > 0 and "slots" in options)
        assert stats["io"]["host"]["seconds"] > 0
        if host_slots == EXPERTS:  # each expert left the disk once
            assert stats["io"]["disk"]["bytes"] <= EXPERTS * runtime.plan.record_bytes
        whole(runtime)
        assert runtime.stats()["io"]["host"]["bytes"] == twin.copies * runtime.plan.record_bytes


# Misses, split


@pytest.mark.parametrize(
    ("mode", "host_slots"), nth(5, product(["cpu", "hybrid"], [0, 10, EXPERTS]))
)
def test_what_the_cpu_computes_differs_by_rounding_alone(on_twin, wanted, mode, host_slots):
    """Plain torch on both sides: all that is left are float32 sums in another order."""
    with on_twin(Twin(1), host_slots, misses=mode, slots=9, kernels="torch") as runtime:
        torch.testing.assert_close(runtime.logits(IDS), wanted[0], rtol=1e-3, atol=1e-3)
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        misses = runtime.stats()["misses"]
        assert misses["mode"] == mode
        assert misses["computed"] > 20
        assert misses["seconds"] > 0
        assert misses["fetched"] > 20
        whole(runtime)
        lent = runtime.stats()["io"]["host"]["lent_bytes"]
        assert lent == misses["computed"] * runtime.plan.record_bytes


def test_the_cpu_begins_before_policy_and_uploads(on_twin, monkeypatch):
    """In a token's layer nothing but copies comes before that.  A single miss is copied."""
    happened = []

    def note(owner, name, event):
        action = getattr(owner, name)
        noted = lambda *given: happened.append(event(*given)) or action(*given)  # noqa: E731
        monkeypatch.setattr(owner, name, noted)

    with on_twin(Twin(1), misses="hybrid", slots=9, kernels="torch") as runtime:
        model, host = runtime.model, runtime.model.store
        model.experts.slots.fills = True  # RAM comes before slots
        assert model.experts.slots._fill(True) and not model.experts.slots.store.staged
        runtime.warm()
        note(model.experts, "_divided", lambda *given: given[0:4:2])  # tokens, what is missing
        for event, *places in (
            ("copy", (host, "read")),
            ("CPU", (model.cpu, "experts")),
            ("policy", (model.experts._cache, "use"), (host.cache, "use")),
            ("upload", (model.device, "upload")),
        ):
            for owner, name in places:
                note(owner, name, lambda *_, event=event: event)
        runtime.generate(PROMPT, 8).read()
    layers = [[]]
    for event in happened:
        if not isinstance(event, str):
            layers.append([event])
        else:
            layers[-1].append(event)
    layers = [layer for layer in layers if layer and layer[0][0] == 1]
    split = [layer[1:] for layer in layers if "CPU" in layer]
    orders = [[*dict.fromkeys(event for event in layer if event != "copy")] for layer in split]
    assert len(orders) > 10 and orders == [["CPU", "policy", "upload"]] * len(orders)
    assert not any("CPU" in layer for layer in layers if len(layer[0][1]) == 1)


def decoded_together(engine):
    """Logits of two sequences' tokens, pass by pass."""
    found = []
    for sequence, cut in zip(engine.batch.sequences, (20, 30), strict=True):
        engine.batch.passes.run([Row(sequence, IDS[:cut], is_prompt=True)])
    for id in IDS[30:34]:
        rows = [Row(sequence, [id + n]) for n, sequence in enumerate(engine.batch.sequences)]
        engine.batch.passes.run(rows)
        found += [row.logits_RV for row in rows]
    return torch.cat(found)


def test_several_sequences_and_traces(on_twin, tmp_path):
    found, traces = [], []
    fewer, split = {"slots": 6}, {"misses": "hybrid", "slots": 9, "kernels": "torch"}
    for options in ({}, fewer, split):
        with on_twin(Twin(1), sequences=2, **{"misses": "fetch", **options}) as runtime:
            runtime.trace(tmp_path / "trace")
            found.append(runtime.engine.call(partial(decoded_together, runtime.engine)))
            whole(runtime)
        traces.append((tmp_path / "trace").read_bytes())
    assert torch.equal(*found[:2])
    torch.testing.assert_close(*found[1:], rtol=1e-3, atol=1e-3)
    assert traces[0] == traces[1] == traces[2]


# Page-locked RAM


def test_ram_that_can_not_be_locked_is_said_once(on_twin, wanted, monkeypatch, caplog):
    """And no more is tried.  What else needs locked RAM got it before."""
    record = 8192
    monkeypatch.setattr(host, "PIN_BYTES", 4 * record)
    twin = Twin()
    twin.gpu.pins = 6 * record
    with on_twin(twin, misses="fetch", slots=6, prefetch=False) as runtime:
        start(runtime)(IDS[:1])  # nine records
        found, slab = runtime.stats()["io"]["host"], runtime.model.store.slab
        assert not found["pinned"] and found["pinned_bytes"] == 4 * record
        twin.gpu.pins = 32 * record
        assert torch.equal(runtime.logits(IDS), wanted[0])
        runtime.warm()
        assert sum(twin.gpu.pinned().values()) == 4 * record
    told = f"only {format_size(4 * record)} of {format_size(slab.nbytes)} of RAM for the twin"
    assert [told in record.message for record in caplog.records] == [True]


def test_three_quarters_of_free_ram_are_locked_and_a_line_says_so(on_twin, monkeypatch):
    """Unless the system locks none, which the first piece shows."""
    monkeypatch.setattr(host, "SAID_BYTES", 1)
    monkeypatch.setattr(loading, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(loading, "process_bytes", lambda: 1 << 30)
    for pins, told in (
        (1 << 30, [r"512\.0 KiB of RAM are page-locked for the twin .* in about 0"]),
        (0, []),
    ):
        twin, said = Twin(), []
        twin.gpu.pins = pins
        with on_twin(twin, misses="fetch", notify=said.append) as runtime:
            assert runtime.plan.host_budget == 7 << 30 and not twin.gpu.pinned()
        assert len(said) == len(told) and all(map(re.match, told, said)), said


@pytest.mark.parametrize("late", [False, True])
def test_ram_is_unlocked_when_copies_from_it_have_ended(on_twin, monkeypatch, late):
    """Also if a thread of the disk queues one while the model is closed."""
    monkeypatch.setattr(host, "PIN_BYTES", 1)  # each record by itself
    twin, ended, begun, closing = Twin(), [], Event(), Event()
    copy, unpin = twin.copy, twin.unpin
    twin.gpu.eager = twin.gpu.wide = 0  # nothing runs that the host does not wait for
    with on_twin(twin, misses="fetch", slots=6, prefetch=False) as runtime:
        slots, store = runtime.model.experts.slots, runtime.model.store
        close = store._disk.close
        store._disk.close = lambda: closing.set() or close()
        twin.copy = lambda *it: begun.set() or (late and not closing.wait()) or copy(*it)
        twin.unpin = lambda memory: ended.append(store._copying[0][0].done()) or unpin(memory)
        runtime.engine.call(lambda: slots.prefetch(0, 1))
        until(lambda: begun.is_set() if late else store._copying)
    assert ended == [True]


def test_runtime_tells_its_device_and_measures_a_link(on_twin, twin_export, monkeypatch):
    """Where the choice follows from it; where there is no GPU it refuses that."""
    measured = []
    monkeypatch.setattr(loading, "with_link", lambda rates, *_, **__: measured.append(1) or rates)
    for misses, times in ("fetch", 0), ("auto", 1):
        with on_twin(Twin(), slots=6, misses=misses) as runtime:
            assert runtime.stats()["device"] == {"name": "the twin", "why": "a test"}
            assert runtime.model.cpu.kind == ("torch" if loading.load() is None else "native")
        assert len(measured) == times
    with pytest.raises(ConfigError, match="misses cpu is given but the device is the CPU"):
        Runtime.open(twin_export, context=64, device="cpu", misses="cpu")


@pytest.mark.slow
def test_bench_measures_all_that_plan_can_know_of_a_gpu(on_twin):
    with on_twin(Twin(), misses="fetch", slots=6, prefetch=False) as runtime:
        runtime.warm()
        kept = calibration(Lasting(runtime.model), measure(runtime, 20, 10, 0, 1))
    assert {*kept} == {*MEASURED} and all(value > 0 for value in kept.values())


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps memory from children")
def test_a_child_process_has_no_copy_of_page_locked_ram(on_twin):
    """Else a write after a fork would move the page away from under a copy to the GPU."""
    common = page_aligned(1 << 20)
    with on_twin(Twin(), 10, misses="fetch", slots=6) as runtime:
        slab = runtime.model.store.slab.tensor
        for memory, end in ((common, 0), (slab, -signal.SIGSEGV)):
            assert os.waitstatus_to_exitcode(forked(partial(quiet_read, memory))) == end


def quiet_read(memory):
    faulthandler.disable()
    bytes(memory.view(-1)[:1].numpy())


def test_what_no_graph_can_hold_runs_without_one(heavy, caplog):
    """A capture that finds no memory is not the last."""
    twin, calls = Twin(2), []

    def short():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return x + 1

    with twin.current(), torch.inference_mode():
        x = twin.upload(torch.ones(3))
        graphs = simulated.graphs.CudaGraphs()
        assert not any(graphs(short) for _ in range(65)) and len(calls) == 2
        graph = graphs(short)
        graph.replay()
        assert graph.outputs.tolist() == [2, 2, 2]
        assert simulated.graphs.CudaGraphs()(lambda: x.sum().item()) is None
    assert "the host waits" in caplog.text and "could not be captured" in caplog.text


def test_kernels_are_loaded_before_copies_are_queued(on_twin, monkeypatch):
    twin, before, summed = Twin(), [], []
    twin.fail = lambda number: before.append((twin.launches > 0, len(summed) > 0))
    plain = TwinBackend.weighted_sum
    monkeypatch.setattr(
        TwinBackend, "weighted_sum", lambda *given: summed.append(1) or plain(*given)
    )
    with on_twin(twin, misses="fetch", slots=6) as runtime:
        runtime.logits(IDS[:1])
    assert before[0] == (True, True)


def test_a_compilers_process_gets_no_ctrl_c(small_export):
    """Its mask is that of the thread that starts it, which all kernels are launched in; a signal to
    all of the terminal's processes is the main thread's alone."""

    def blocked():
        text = Path("/proc/thread-self/status").read_text()
        return int(re.search(r"SigBlk:\s+(\w+)", text)[1], 16)

    before = blocked()
    with Runtime.open(small_export) as runtime:
        mask = runtime.engine.call(blocked)
    assert all(mask >> number - 1 & 1 for number in ENDING)
    assert blocked() == before and not before >> signal.SIGINT - 1 & 1
