"""What ends a text from outside: Ctrl-C at any moment, ``close`` from another thread, a fork, a
disk that does not answer.  The next text has the same bits."""

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slotmoe.errors import ConfigError
from slotmoe.offload.engine import engine as engines
from slotmoe.offload.experts import disk
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from slotmoe.signals import Stopping
from tests.support.disk import forked
from tests.support.engine import IDS, PROMPT, until, whole
from tests.support.interrupts import KINDS, check, compute, on_threads, struck
from tests.support.params import nth
from tests.support.tiny import SAMPLE
from tests.support.twin import freed

CTRL_C = signal.SIGINT


@pytest.fixture(autouse=True)
def ctrl_c(always_guessing):
    """Ctrl-C raises, whoever has started the tests.  A test that hangs says where."""
    before = signal.signal(CTRL_C, signal.default_int_handler)
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.signal(CTRL_C, before)


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


# Ctrl-C


def press(seconds):
    """Ctrl-C after so many seconds, in this process."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), CTRL_C))
    timer.start()
    return timer


@pytest.mark.parametrize("kind", ["helping", "threads"])
def test_ctrl_c_at_any_moment_leaves_the_bits(sample_export, monkeypatch, kind):
    """While a text is begun, waited for and read, and while logits are."""
    with KINDS[kind](sample_export, monkeypatch) as runtime:
        want, ids = compute(runtime), [token.id for token in runtime.generate(PROMPT, 10)]
        logits = runtime.logits(IDS)
        struck = 0
        for number in range(24):
            try:
                press(0.001 + 0.003 * number)
                list(runtime.generate(PROMPT, 10)) if number % 3 else runtime.logits(IDS)
                until(lambda: False)  # the signal comes here, if it has not before
            except KeyboardInterrupt:
                struck += 1
            if number % 4 == 3:
                assert [token.id for token in runtime.generate(PROMPT, 10)] == ids
                assert runtime.logits(IDS).equal(logits)
        assert struck == 24
        check(runtime, want)


def test_ctrl_c_ends_a_text_within_one_layer(sample_export):
    layers, inside, over = [], threading.Event(), threading.Event()

    def at_a_layer(route):
        layers.append(route.moe_layer)
        inside.set()
        assert over.wait(30)

    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        stop = runtime.engine.call(lambda: runtime.model.experts.on_layer(at_a_layer))
        stream = runtime.generate(IDS, 5)
        assert inside.wait(30)
        timer = press(0.01)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        timer.join()
        over.set()
        until(lambda: runtime.engine.batch.running == {})
        assert layers == [0] and [*stream] == []
        runtime.engine.call(stop)
        whole(runtime)


def test_ctrl_c_ends_the_filling_of_slots(sample_export):
    calls = []

    def at_three(*_):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), CTRL_C)
            time.sleep(1)  # the main thread is told meanwhile

    with Runtime.open(sample_export, context=64) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.warm(at_three)
        whole(runtime)
    assert len(calls) <= 4


RUN = "run EXPORT hello -n 3 --context 64"
EVERY = {  # of the functions that a command calls, one in so many gets a signal
    RUN: 150,
    "list": 40,
    "chat EXPORT -n 3 --context 64 --session x --session-dir FOLDER": 60,
    "quantize CHECKPOINT FOLDER/export --overwrite": 60,
    "verify EXPORT": 60,
    "synth CHECKPOINT/config.json FOLDER/export": 60,
    "plan v2-lite": 60,
    "bench EXPORT --prompt-tokens 8 --decode-tokens 4 --repetitions 1 --context 64": 60,
    "eval EXPORT --text CHECKPOINT/config.json --window 64": 60,
    "profile EXPORT hello -n 3 --context 64 -o FOLDER": 60,
    "rm --sessions --all --session-dir FOLDER": 60,
    "doctor": 60,
}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("number", nth(2, [signal.SIGINT, signal.SIGTERM]))
@pytest.mark.parametrize("words", nth(len(EVERY), EVERY))
def test_a_signal_in_any_function_ends_a_command(words, number, sample_export, tmp_path):
    """Also while libraries are imported, where they lose exceptions."""
    places = {"EXPORT": sample_export, "CHECKPOINT": SAMPLE, "FOLDER": tmp_path}
    every = EVERY[words]
    for name, place in places.items():
        words = words.replace(name, str(place))
    count, wrong = struck(number, every, *words.split())
    assert count > 20 and wrong == []


def test_the_first_signal_stops_and_the_next_acts_as_before():
    numbers, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stopping(numbers.append) as stopping:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
        stopping.check()
        signal.raise_signal(signal.SIGTERM)
        assert numbers == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(CTRL_C)
    signal.signal(signal.SIGHUP, before)
    with pytest.raises(SystemExit, match="143"):
        stopping.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def stuck(sample_export, monkeypatch):
    """A runtime whose disk does not answer any more, until the test's end, and an event: a read
    waits for it."""
    read, broken, waiting, over = Export.read_range, *(threading.Event() for _ in range(3))
    late = []

    def read_range(*arguments):
        if broken.is_set():
            waiting.set()
            if not over.wait(30):
                late.append(arguments)
        read(*arguments)

    monkeypatch.setattr(Export, "read_range", read_range)
    runtime = on_threads(sample_export, monkeypatch)
    compute(runtime)
    for module in (engines, disk):
        monkeypatch.setattr(module, "STUCK_SECONDS", 0.5)
    broken.set()
    yield runtime, waiting
    over.set()
    assert not late, "only the disk's answer ended the wait"


def test_ctrl_c_ends_the_wait_for_a_stuck_disk(caplog, stuck):
    runtime, waiting = stuck
    stream = runtime.generate(IDS, 5)
    assert waiting.wait(30)
    timer = press(0.05)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    timer.join()
    runtime.close()
    assert "the disk does not answer" in caplog.text


def test_close_from_another_thread_ends_a_computation(sample_export, thread):
    """And every use after it is refused."""
    runtime = Runtime.open(sample_export, context=256, slots=22)
    tokens, waiting = runtime.generate(IDS[:5], None), runtime.generate(IDS[:7], None)
    next(tokens)
    engine, layers, inside, closing = runtime.engine, [], threading.Event(), threading.Event()

    def at_a_layer(route):
        layers.append(route.moe_layer)
        inside.set()
        assert closing.wait(30)

    engine.call(lambda: runtime.model.experts.on_layer(at_a_layer))
    other = thread.submit(lambda: [*tokens])
    assert inside.wait(30)
    engine.stop()
    closing.set()
    runtime.close()
    assert "this Runtime is closed" in str(other.exception(60)) and len(layers) == 1
    for use in (
        lambda: runtime.logits(IDS[:3]),
        lambda: runtime.generate(IDS[:3]),
        lambda: next(waiting),
        lambda: runtime.model,
        lambda: engine.call(lambda: 0),
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

        def in_child():
            for use in (
                lambda: runtime.engine.force([5]),
                lambda: runtime.logits(IDS),
                runtime.warm,
            ):
                with pytest.raises(ConfigError, match="before the process forked"):
                    use()
            runtime.close()
            with pytest.raises(ConfigError, match="closed"):
                runtime.logits(IDS)

        assert forked(in_child) == 0
        check(runtime, want)


@pytest.mark.usefixtures("processes")
def test_a_process_ends_while_a_text_is_computed(sample_export):
    """No crash, no hang, no traceback: nobody has closed the runtime."""
    program = """
import sys
from slotmoe import Runtime
runtime = Runtime.open(sys.argv[1], context=256, slots=22)
stream = runtime.generate("Call me", None)
print(next(stream).text)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, sample_export], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


# Memory


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("kind", ["helping", "hybrid"])
def test_closing_frees_network_slots_and_a_gpu(sample_export, monkeypatch, kind):
    runtime = KINDS[kind](sample_export, monkeypatch)
    with freed(runtime):
        compute(runtime)


def test_a_runtime_that_nobody_closed_ends_its_threads(sample_export):
    runtime = Runtime.open(sample_export, context=256, slots=22)
    engine = runtime.engine
    next(runtime.generate(IDS[:5], None))
    del runtime
    gc.collect()
    assert not engine.alive
