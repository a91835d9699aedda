"""A child that answers for strangers' input: its limits, its replacement, its end."""

import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from slotmoe.errors import ConfigError
from slotmoe.model.child import Child

PROGRAM = """
import time
kept = []
def answer(data):
    limit()
    exec(data, globals())
    return repr(said).encode()
"""
PID = "said = os.getpid()"

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def child():
    child = Child(PROGRAM, 0.2, 64 << 20)
    yield child
    child.close()


def ask(child, code):
    return eval(child.run(code.encode(), "this"))


def test_it_stays_and_is_alone(child, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    pid = ask(child, PID)
    assert ask(child, "said = os.getppid()") == os.getpid() != pid
    with pytest.raises(ConfigError, match=r"^this: failed \(ValueError: a b\)$"):
        ask(child, "raise ValueError('a\\n  b')")
    for _ in range(3):  # each is below the limits, together they are above
        ask(child, "said, end = 0, time.process_time() + 0.1\nwhile time.process_time() < end: 0")
        ask(child, "said = len(bytes(32 << 20))")
    assert "hf_secret" not in str(ask(child, "said = str(os.environ)"))
    # Ctrl-C goes to the processes of the terminal's session.
    assert ask(child, "said = os.getcwd(), os.getsid(0) == os.getpid()") == ("/", True)
    assert ask(child, PID) == pid


BREAKS = {
    "endless": ("while True: 0", "did not finish in 0.2 seconds"),
    "memory": ("bytes(65 << 20)", "MemoryError"),
    "crashes": ("os.abort()", "signal 6"),
    "too-large": ("os.write(1, b'\\0' * 8 + b'\\1'); time.sleep(60)", "broken or hostile"),
    "half": ("os.write(1, b'\\0\\5' + b'\\0' * 7 + b'ab'); os._exit(0)", "exit code 0"),
}


@pytest.mark.parametrize("name", [*BREAKS, "killed", "interrupted"])
def test_it_is_replaced_when_it_breaks(name, child, monkeypatch):
    pid, files = ask(child, PID), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        if name == "killed":
            psutil.Process(pid).kill()
            child._process.wait()
        elif name == "interrupted":  # what it was asked then has no late answer
            patched.setattr(child, "_read", lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                ask(child, "said = 'late'")
        else:
            code, problem = BREAKS[name]
            with pytest.raises(ConfigError, match=problem):
                ask(child, code)
            assert not psutil.pid_exists(pid)  # it has been waited for
    assert ask(child, PID) != pid
    assert len(os.listdir("/proc/self/fd")) == files


def test_it_is_replaced_when_it_hangs():
    child = Child(PROGRAM, 0.02, 64 << 20)
    with pytest.raises(ConfigError, match="did not finish; the machine is overloaded"):
        ask(child, "time.sleep(1000)")
    assert child._process is None


def test_it_is_replaced_when_it_keeps_what_it_read(child):
    pid = ask(child, PID)
    assert ask(child, "kept.append(bytes(40 << 20)); said = 1")
    assert ask(child, PID) == pid
    assert ask(child, "kept.append(bytes(40 << 20)); said = 1")  # its limit is from here on
    assert ask(child, PID) != pid


def test_threads_get_their_own_answers(child):
    def shout(number):
        return ask(child, f"said = {number}" if number % 10 else "sys.exit()")

    with ThreadPoolExecutor(8) as pool:
        asked = {number: pool.submit(shout, number) for number in range(60)}
    for number, future in asked.items():
        if number % 10:
            assert future.result() == number
        else:
            assert isinstance(future.exception(), ConfigError)
