"""Whatever ends a pass, wherever: the next one computes the same bits, and no slot is lost."""

import faulthandler
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload import sequence
from slotmoe.offload.exclusive import Exclusive
from slotmoe.offload.experts import disk
from slotmoe.offload.experts.source import WARM
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from tests.support.disk import forked
from tests.support.engine import IDS, whole
from tests.support.interrupts import CTRL_C, KINDS, check, compute, interrupt, lines_of, on_threads
from tests.support.twin import freed


@pytest.fixture(autouse=True)
def ctrl_c(always_guessing):
    """Ctrl-C raises, whoever has started the tests.  A test that hangs says where."""
    before = signal.signal(CTRL_C, signal.default_int_handler)
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.signal(CTRL_C, before)


def interrupted(export, monkeypatch, kind, count):
    """Exceptions and signals at lines by chance, until so many came while a pass ran."""
    with KINDS[kind](export, monkeypatch) as runtime:
        compute(runtime)
        lines, chance = lines_of(lambda: compute(runtime)), random.Random(5)
        picked = chance.sample(sorted(lines), len(lines))
        chosen = [(line, chance.randint(1, max(1, lines[line] * 3 // 4))) for line in picked]
        assert interrupt(runtime, chosen, kind != "hybrid", count) == count


@pytest.mark.parametrize("kind", ["helping", "threads"])
def test_interrupted_at_some_lines(sample_export, monkeypatch, kind):
    interrupted(sample_export, monkeypatch, kind, 12)


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"helping", "threads"}))
def test_interrupted_at_some_lines_beside_a_gpu(sample_export, monkeypatch, kind):
    interrupted(sample_export, monkeypatch, kind, 8)


# Ctrl-C


def test_ctrl_c_waits_for_a_layers_end(sample_export, monkeypatch):
    """The handler that was there is called there, once for two signals at most, and may go on.  An
    ignored one stays ignored."""
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want, experts, seen = compute(runtime), runtime.model.experts, []
        original = type(experts)._end_of_layer
        signal.signal(CTRL_C, lambda *_: seen.append("handled"))

        def end_of_layer(self, row):
            seen.append(row)
            original(self, row)

        def at_a_gate(route):
            if route.row == 2 and "handled" not in seen:
                signal.raise_signal(CTRL_C)
                seen.append("signal")

        monkeypatch.setattr(type(experts), "_end_of_layer", end_of_layer)
        stop_listening = experts.on_layer(at_a_gate)
        assert torch.equal(compute(runtime), want)
        stop_listening()
        assert seen.count("handled") == 1
        around = seen[seen.index("signal") - 1 :][:4]
        assert around in ([1, "signal", "handled", 2], [1, "signal", 2, "handled"])
        signal.signal(CTRL_C, signal.SIG_IGN)
        experts.on_layer(lambda route: signal.raise_signal(CTRL_C))
        assert torch.equal(compute(runtime), want)
        assert signal.getsignal(CTRL_C) is signal.SIG_IGN


def test_ctrl_c_ends_the_filling_of_slots(sample_export):
    calls = []

    def press(*_):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(CTRL_C)

    with Runtime.open(sample_export, context=64) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.warm(press)
        whole(runtime)
    assert len(calls) <= 4


@pytest.fixture
def stuck(sample_export, monkeypatch):
    """A runtime whose disk does not answer any more, until the test's end, and an event: a pass
    waits for it."""
    read, wait = Export.read_range, disk.DiskReader.wait
    broken, waiting, over = (threading.Event() for _ in range(3))
    late = []

    def read_range(*arguments):
        if broken.is_set() and not over.wait(30):
            late.append(arguments)
        read(*arguments)

    def waits(*arguments):
        if broken.is_set():
            waiting.set()
        return wait(*arguments)

    monkeypatch.setattr(Export, "read_range", read_range)
    monkeypatch.setattr(disk.DiskReader, "wait", waits)
    for module in (disk, sequence):
        monkeypatch.setattr(module, "STUCK_SECONDS", 0.5)
    runtime = on_threads(sample_export, monkeypatch)
    compute(runtime)
    broken.set()
    yield runtime, waiting
    over.set()
    assert not late, "only the disk's answer ended the wait"


def test_a_second_ctrl_c_ends_the_wait_for_a_stuck_disk(monkeypatch, caplog, stuck, thread):
    (runtime, waiting), heard, wait = stuck, [], disk.DiskReader.wait

    def handler(*_):
        heard.append("Ctrl-C")
        if len(heard) == 1:
            raise KeyboardInterrupt

    def press_and_wait(*arguments):
        signal.raise_signal(CTRL_C)
        assert not heard  # it is held back
        return wait(*arguments)

    def press_again():
        assert waiting.wait(30)
        while not heard:  # a signal just before a thread begins to wait would not wake it
            os.kill(os.getpid(), CTRL_C)
            time.sleep(0.05)

    signal.signal(CTRL_C, handler)
    monkeypatch.setattr(disk.DiskReader, "wait", press_and_wait)
    pressed = thread.submit(press_again)
    with pytest.raises(KeyboardInterrupt):
        runtime.logits(IDS)
    assert pressed.exception(60) is None
    runtime.close()
    assert "the disk does not answer" in caplog.text


def test_a_read_is_done_whatever_happens_in_its_thread(sample_export):
    """Also if what it calls at its end fails."""

    def after(arrived):
        raise RuntimeError("a mistake")

    with Export.open(sample_export) as export:
        reader = disk.DiskReader(export, direct=False, threads=1)
        memory = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        reads = [reader.read(id, memory, WARM) for id in (3, 4)]
        reads[0].after = after
        for read in reads:  # the thread goes on
            reader.submit([read])
            assert reader.wait([read]) == [read]
        assert str(reads[0].error) == "a mistake" and reads[1].error is None
        reader.close()


# Threads


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_second_thread_is_refused_and_spoils_nothing(sample_export, thread):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want, inside, over = compute(runtime), threading.Event(), threading.Event()
        stop = runtime.model.experts.on_layer(lambda route: (inside.set(), over.wait(30)))
        other = thread.submit(compute, runtime)
        assert inside.wait(30)
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
        assert torch.equal(other.result(60), want)
        stop()
        check(runtime, want)


@pytest.mark.usefixtures("nightly")
def test_many_threads_get_right_logits_or_a_refusal(sample_export):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want = compute(runtime)

        def refused(_):
            try:
                return not torch.equal(runtime.logits(IDS[:20]), logits) and "other logits"
            except ConfigError as problem:
                return str(problem)

        logits = runtime.logits(IDS[:20])
        with ThreadPoolExecutor(8) as pool:
            problems = {*pool.map(refused, range(1600))} - {False}
        assert all("another thread" in text or "superseded" in text for text in problems)
        check(runtime, want)


def test_what_another_thread_changed_is_no_basis_for_more(sample_export, thread):
    """A text that comes piece by piece ends where another thread came between two pieces."""
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        first = runtime.sequences[0]
        for begin, change in (
            (lambda: runtime.logits_from(IDS * 4), lambda: runtime.logits(IDS[:5])),
            (lambda: runtime.logits_from(IDS * 4), lambda: first.append([5])),
            (lambda: first.append_rows(IDS), lambda: runtime.logits(IDS[:5])),
            (lambda: runtime.generate(IDS, 5), lambda: first.append([5])),
        ):
            pieces = begin()
            next(pieces)
            thread.submit(change).result(60)
            with pytest.raises(ConfigError, match="superseded"):
                list(pieces)


def test_close_from_another_thread_ends_a_wait(stuck, thread):
    runtime, waiting = stuck
    other = thread.submit(runtime.logits, IDS)
    assert waiting.wait(30)
    runtime.close()
    problem = other.exception(60)
    assert isinstance(problem, ConfigError) and "this Runtime is closed" in str(problem)
    runtime.close()  # a second time: nothing


def test_close_from_another_thread_ends_a_computation(sample_export, monkeypatch, thread):
    """And every use after it is refused."""
    runtime = Runtime.open(sample_export, context=256, slots=22)
    kept, tokens = runtime.sequences[0], runtime.generate(IDS[:5], 5)
    next(tokens)
    inside, closing, refuse = threading.Event(), threading.Event(), Exclusive.refuse
    layers = []

    def at_a_gate(route):
        layers.append(route.row)
        inside.set()
        assert closing.wait(30)

    monkeypatch.setattr(Exclusive, "refuse", lambda *given: (refuse(*given), closing.set()))
    runtime.model.experts.on_layer(at_a_gate)
    other = thread.submit(lambda: list(runtime.generate(IDS, 100)))
    assert inside.wait(30)
    runtime.close()
    assert "this Runtime is closed" in str(other.exception(60)) and layers == [0]
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

        assert forked(in_child) == 0
        check(runtime, want)


# Memory


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", ["helping", "hybrid"])
def test_closing_frees_network_slots_and_a_gpu(sample_export, monkeypatch, kind):
    runtime = KINDS[kind](sample_export, monkeypatch)
    with freed(runtime):
        compute(runtime)
