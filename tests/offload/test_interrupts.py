"""Whatever ends a pass, wherever: the next one computes the same bits, and no slot is lost."""

import faulthandler
import gc
import os
import random
import signal
import threading
import time
import weakref

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload import sequence
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.tiers import disk
from slotmoe.quant.export.reader import Export
from tests.support.disk import forked
from tests.support.engine import IDS, whole
from tests.support.interrupts import (
    KINDS,
    check,
    compute,
    ctrl_c_after,
    interrupt,
    lines_of,
    on_threads,
    random_ctrl_c,
)
from tests.support.params import nth
from tests.support.tiny import SAMPLE
from tests.support.twin import Twin, open_on


@pytest.fixture(autouse=True)
def always_guessing(always_guessing):
    """And a test that hangs says where."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_some_lines(sample_export, monkeypatch, kind):
    with KINDS[kind](sample_export, monkeypatch) as runtime:
        compute(runtime)
        lines, chance = lines_of(lambda: compute(runtime)), random.Random(5)
        picked = chance.sample(sorted(lines), 15 if kind in ("helping", "threads") else 5)
        chosen = [(line, chance.randint(1, max(1, lines[line] * 3 // 4))) for line in picked]
        came = interrupt(runtime, chosen, kind != "hybrid")
        assert came > len(chosen) // 2  # timing skips some lines


# Ctrl-C


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_random_moments(sample_export, monkeypatch, kind):
    with KINDS[kind](sample_export, monkeypatch) as runtime:
        assert random_ctrl_c(runtime, 4, kind != "hybrid") >= 1


def test_ctrl_c_waits_for_a_layers_end(sample_export, monkeypatch):
    """The handler that was there is called there, once for two signals at most, and may go on."""
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want, experts = compute(runtime), runtime.model.experts
        kind, seen = type(experts), []
        original = kind._end_of_layer
        before = signal.signal(signal.SIGINT, lambda *_: seen.append("handled"))
        try:

            def end_of_layer(self, row):
                seen.append(row)
                original(self, row)

            def at_a_gate(route):
                if route.row == 2 and "handled" not in seen:
                    signal.raise_signal(signal.SIGINT)
                    seen.append("signal")

            monkeypatch.setattr(kind, "_end_of_layer", end_of_layer)
            stop_listening = experts.on_route(at_a_gate)
            assert torch.equal(compute(runtime), want)
            stop_listening()
        finally:
            signal.signal(signal.SIGINT, before)
        assert seen.count("handled") == 1
        around = seen[seen.index("signal") - 1 :][:4]
        assert around in ([1, "signal", "handled", 2], [1, "signal", 2, "handled"])


@pytest.mark.parametrize("path", ["warm", "reference"])
def test_ctrl_c_ends_what_has_no_layers_of_slots(sample_export, path):
    """Filling slots, and the reference path."""
    options = {"quantize": False} if path == "reference" else {}
    model = SAMPLE if path == "reference" else sample_export
    with Runtime.open(model, context=64, **options) as runtime:
        calls = []

        def press(*_):
            calls.append(0)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)

        if path == "warm":
            with pytest.raises(KeyboardInterrupt):
                runtime.warm(press)
            whole(runtime)
        else:
            backend = runtime.model.backend
            original = backend.experts
            backend.experts = lambda *given: (press(), original(*given))[1]
            with pytest.raises(KeyboardInterrupt):
                runtime.logits(IDS)
        assert len(calls) <= 4


def test_an_ignored_ctrl_c_is_ignored(sample_export):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            stop = runtime.model.experts.on_route(lambda route: signal.raise_signal(signal.SIGINT))
            compute(runtime)
            stop()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)


@pytest.fixture
def stuck_disk(monkeypatch):
    """A disk that stops answering when the event is set, until the test's end."""
    original, stuck, over = Export.read_range, threading.Event(), threading.Event()

    def read_range(*arguments):
        if stuck.is_set():
            over.wait(60)
        original(*arguments)

    monkeypatch.setattr(Export, "read_range", read_range)
    for module in (disk, sequence):
        monkeypatch.setattr(module, "STUCK_SECONDS", 0.5)
    yield stuck
    over.set()


def test_a_second_ctrl_c_ends_the_wait_for_a_stuck_disk(
    sample_export, monkeypatch, caplog, stuck_disk
):
    runtime = on_threads(sample_export, monkeypatch)
    compute(runtime)
    stuck_disk.set()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.3, 0.6):
        runtime.logits(IDS)
    assert 0.5 < time.monotonic() - started < 3
    runtime.close()
    assert time.monotonic() - started < 5
    assert "the disk does not answer" in caplog.text


def test_a_read_is_done_whatever_happens_in_its_thread(sample_export):
    """Also if what it calls at its end fails."""

    def after(arrived):
        raise RuntimeError("a mistake")

    with Export.open(sample_export) as export:
        reader = disk.DiskReader(export, direct=False, threads=1)
        memory = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        reads = [reader.read(id, memory, disk.WARM) for id in (3, 4)]
        reads[0].after = after
        for read in reads:  # the thread goes on
            reader.submit([read])
            assert reader.wait([read]) == [read]
        assert str(reads[0].error) == "a mistake" and reads[1].error is None
        reader.close()


# Threads


def in_thread(action):
    """Start ``action`` in a thread; the returned function waits and gives what it gave or
    raised."""
    results = []

    def run():
        try:
            results.append(action())
        except BaseException as problem:
            results.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def finish():
        thread.join(20)
        assert not thread.is_alive()
        return results[0]

    return finish


def test_a_second_thread_is_refused_and_spoils_nothing(sample_export):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want, inside, over = compute(runtime), threading.Event(), threading.Event()

        def hold(route):
            inside.set()
            over.wait(20)

        stop = runtime.model.experts.on_route(hold)
        finish = in_thread(lambda: compute(runtime))
        assert inside.wait(20)
        first = runtime.sequences[0]
        for use in (
            lambda: runtime.logits(IDS),
            lambda: list(runtime.logits_from(IDS)),
            lambda: list(runtime.generate(IDS, 3)),
            lambda: first.append([5]),
            lambda: list(first.append_rows([5])),
            lambda: list(first.run([5])),
            lambda: runtime.append_each([first], [5]),
            lambda: first.rewind(0),
            lambda: first.take(first, 0),
            lambda: first.fill(3),
            runtime.warm,
        ):
            with pytest.raises(ConfigError, match=r"^Runtime is in use by another thread"):
                use()
        over.set()
        assert torch.equal(finish(), want)
        stop()
        check(runtime, want)


def test_what_another_thread_changed_is_no_basis_for_more(sample_export):
    """A text that comes piece by piece ends where another thread came between two pieces."""
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        for begin in (
            lambda: runtime.logits_from(IDS * 4),
            lambda: runtime.sequences[0].append_rows(IDS),
            lambda: runtime.generate(IDS, 5),
        ):
            for change in (
                lambda: runtime.logits(IDS[:5]),
                lambda: runtime.sequences[0].append([5]),
            ):
                pieces = begin()
                next(pieces)
                in_thread(change)()
                with pytest.raises(ConfigError, match="superseded"):
                    list(pieces)


def many_threads(export, threads, rounds):
    """Each thread gets the right logits or a clear refusal; how many of each."""
    with Runtime.open(export, context=256, slots=22) as runtime:
        want, refusals = runtime.logits(IDS[:20]), list[str]()

        def work():
            right = refused = 0
            for _ in range(rounds):
                try:
                    assert torch.equal(runtime.logits(IDS[:20]), want)
                    right += 1
                except ConfigError as problem:
                    refusals.append(str(problem))
                    refused += 1
            return right, refused

        results = [finish() for finish in [in_thread(work) for _ in range(threads)]]
        assert all(isinstance(result, tuple) for result in results), results
        assert all("another thread" in text or "superseded" in text for text in refusals)
        whole(runtime)
        assert torch.equal(runtime.logits(IDS[:20]), want)
        return [sum(counts) for counts in zip(*results, strict=True)]


def test_threads_get_right_logits_or_a_refusal(sample_export):
    right, refused = many_threads(sample_export, 4, 12)
    assert right > 0 and refused > 0


@pytest.mark.usefixtures("nightly")
def test_many_threads_get_right_logits_or_a_refusal(sample_export):
    right, refused = many_threads(sample_export, 8, 200)
    assert right > 0 and refused > 0


def test_close_from_another_thread_ends_a_wait(sample_export, monkeypatch, stuck_disk):
    runtime = on_threads(sample_export, monkeypatch)
    compute(runtime)
    stuck_disk.set()
    finish = in_thread(lambda: runtime.logits(IDS))
    time.sleep(0.2)
    started = time.monotonic()
    runtime.close()
    problem = finish()
    assert isinstance(problem, ConfigError) and "this Runtime is closed" in str(problem)
    assert time.monotonic() - started < 5
    runtime.close()  # a second time: nothing


def test_close_from_another_thread_ends_a_computation(sample_export):
    runtime = Runtime.open(sample_export, context=256, slots=22)
    inside = threading.Event()
    runtime.model.experts.on_route(lambda route: (inside.set(), time.sleep(0.05)))
    finish = in_thread(lambda: list(runtime.generate(IDS, 100)))
    assert inside.wait(20)
    runtime.close()
    assert "this Runtime is closed" in str(finish())


def test_use_after_close_is_refused(sample_export):
    runtime = Runtime.open(sample_export, context=64)
    kept, tokens = runtime.sequences[0], runtime.generate(IDS[:5], 5)
    next(tokens)
    runtime.close()
    runtime.close()
    for use in (
        lambda: runtime.logits(IDS[:3]),
        lambda: list(runtime.generate(IDS[:3])),
        lambda: next(tokens),
        lambda: kept.append([5]),
        lambda: runtime.sequences,
        lambda: runtime.model,
        runtime.stats,
        runtime.warm,
    ):
        with pytest.raises(ConfigError, match=r"^this Runtime is closed; open the model again$"):
            use()


@pytest.mark.usefixtures("processes", "twin")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("kind", ["helping", "gpu"])
def test_a_forked_child_is_refused_and_does_not_hang(sample_export, monkeypatch, kind):
    with KINDS[kind](sample_export, monkeypatch) as runtime:
        want = compute(runtime)
        kept = runtime.sequences[0]

        def in_child():
            for use in (lambda: kept.append([5]), lambda: runtime.logits(IDS), runtime.warm):
                with pytest.raises(ConfigError, match="before the process forked"):
                    use()
            runtime.close()
            with pytest.raises(ConfigError, match="closed"):
                runtime.logits(IDS)

        assert forked(in_child, after=None) == 0
        check(runtime, want)


# Memory


@pytest.mark.usefixtures("interpreter", "twin")
@pytest.mark.parametrize("kind", [*KINDS, *nth(2, ["triton, all in slots", "triton"])])
def test_closing_frees_network_and_slots(sample_export, small_export, monkeypatch, kind):
    """Without a garbage collection: the next model needs the memory now."""
    gc.collect()
    gc.disable()
    try:
        if kind.startswith("triton"):
            slots = 6 if kind == "triton" else None
            runtime = open_on(small_export, Twin(triton=True), misses="fetch", slots=slots)
            runtime.warm()
            compute(runtime)
        else:
            runtime = KINDS[kind](sample_export, monkeypatch)
            compute(runtime)
        model, twin = runtime.model, runtime.model.device
        parts = [model.network, model.network.layers[1], model.caches[0], model.experts]
        parts += [model.experts.slots.slab, model.store]
        if kind.startswith("triton"):
            parts += model.network._decoder._layers
        gone = [weakref.ref(part) for part in parts]
        del model, parts
        runtime.close()
        assert [ref() for ref in gone] == [None] * len(gone)
        if kind in ("gpu", "hybrid"):  # Triton's interpreter keeps tensors itself
            assert twin.allocated == 0
    finally:
        gc.enable()
