"""What ends a text from outside: Ctrl-C at any moment, ``close`` from another thread, a fork, a
kill.  The next text has the same bits."""

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload.experts import disk
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.names import NamedSession
from slotmoe.signals import Stopping
from tests.support.disk import forked
from tests.support.engine import IDS, PROMPT, decode, until, whole
from tests.support.forkserver import PIPE, Forked

CTRL_C = signal.SIGINT


def compute(runtime):
    """Prefill and decode: all logits."""
    runtime.engine.empty()
    return decode(runtime, IDS[:12], [7, 8])


def check(runtime, want):
    """What was cancelled has ended, the next pass is right, and no slot is lost."""
    runtime.engine.call(lambda: whole(runtime))
    assert torch.equal(compute(runtime), want)
    runtime.engine.call(lambda: whole(runtime))


@pytest.fixture(autouse=True)
def ctrl_c(always_guessing):
    """Ctrl-C raises, whoever has started the tests.  A test that hangs says where."""
    before = signal.signal(CTRL_C, signal.default_int_handler)
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.signal(CTRL_C, before)


def press(seconds):
    """Ctrl-C after so many seconds, in this process."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), CTRL_C))
    timer.start()
    return timer


@pytest.mark.parametrize("is_helped", [True, False])
def test_ctrl_c_at_any_moment_leaves_the_bits(heavy, sample_export, monkeypatch, is_helped):
    """While a text is begun, waited for and read, and while logits are."""
    if not is_helped:  # every record is read by the threads, in several pieces
        monkeypatch.setattr(disk, "HELP_BYTES", 0)
        monkeypatch.setattr(disk, "PIECE_BYTES", 8192)
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        want, ids = compute(runtime), [token.id for token in runtime.generate(PROMPT, 10)]
        logits = runtime.logits(IDS)
        struck = 0
        for number in range(12):
            try:
                press(0.001 + 0.006 * number)
                list(runtime.generate(PROMPT, 10)) if number % 3 else runtime.logits(IDS)
                until(lambda: False)  # the signal comes here, if it has not before
            except KeyboardInterrupt:
                struck += 1
            if number % 4 == 3:
                assert [token.id for token in runtime.generate(PROMPT, 10)] == ids
                assert runtime.logits(IDS).equal(logits)
        assert struck == 12
        check(runtime, want)


def test_closing_frees_network_and_slots(sample_export):
    """Without a garbage collection: the next model needs the memory now."""
    runtime = Runtime.open(sample_export, context=256, slots=22)
    compute(runtime)
    gc.collect()
    gc.disable()
    try:
        model = runtime.model
        parts = model.network, model.states[0], model.experts, model.experts.slots.slab, model.store
        gone = [weakref.ref(part) for part in parts]
        del model, parts
        runtime.close()
        assert not [type(ref()) for ref in gone if ref() is not None]
    finally:
        gc.enable()


def held(runtime):
    """The layers that pass, each of which waits; the events of a layer and of the end of waiting;
    and what ends the listening."""
    layers, inside, over = [], threading.Event(), threading.Event()

    def at_a_layer(route):
        layers.append(route.moe_layer)
        inside.set()
        assert over.wait(30)

    stop = runtime.engine.call(lambda: runtime.model.experts.on_layer(at_a_layer))
    return layers, inside, over, stop


def test_ctrl_c_ends_a_text_within_one_layer(sample_export):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
        layers, inside, over, stop = held(runtime)
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


def test_close_from_another_thread_ends_a_computation(sample_export):
    """And every use after it is refused."""
    runtime = Runtime.open(sample_export, context=256, slots=22)
    tokens, waiting = runtime.generate(IDS[:5], None), runtime.generate(IDS[:7], None)
    layers, inside, closing, _ = held(runtime)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [*tokens])
        assert inside.wait(30)
        runtime.engine.stop()
        closing.set()
        runtime.close()
        assert "this Runtime is closed" in str(other.exception(60)) and len(layers) == 1
    for use in (
        lambda: runtime.logits(IDS[:3]),
        lambda: runtime.generate(IDS[:3]),
        lambda: next(waiting),
        runtime.stats,
        runtime.warm,
    ):
        with pytest.raises(ConfigError, match=r"^this Runtime is closed; open the model again$"):
            use()


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_is_refused_and_does_not_hang(sample_export):
    with Runtime.open(sample_export, context=256, slots=22) as runtime:
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


@pytest.mark.usefixtures("processes")
def test_a_killed_chat_leaves_what_it_has_saved(sample_export, tmp_path):
    """And the next one of that name goes on with it."""
    words = "chat", sample_export, "-n", 40, "--session", "x", "--session-dir", tmp_path
    with Forked(*words, stdin=PIPE) as child:
        child.stdin.write(b"Hello\n")
        child.stdin.flush()
        until((tmp_path / "names" / "x.json").exists)
        child.stdin.write(b"And then?\n")
        child.stdin.flush()
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with NamedSession(tmp_path, "x") as session:
        messages = session.saved.messages
    assert [message["role"] for message in messages[:2]] == ["user", "assistant"]
    with Forked(*words, stdin=PIPE) as child:
        err = child.communicate(b"More\n")[1].decode()
    assert child.returncode == 0, err
    with NamedSession(tmp_path, "x") as session:
        assert session.saved.messages[:-2] == messages
