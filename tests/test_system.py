"""What differs between systems: reads past the page cache.  What the system refuses names the file,
and is not called damage: a bad disk, rights, too many open files."""

import atexit
import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from slotmoe import system
from slotmoe.errors import CheckpointError, SlotmoeError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from tests.support.tiny import SAMPLE

BLOCK, WEIGHTS = 4096, "model-00001-of-00003.safetensors"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * BLOCK))
    handle = os.open(path, os.O_RDONLY)
    yield handle
    os.close(handle)


def is_direct(handle):
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


def test_direct_reads_and_back(file):
    assert system.bypass_page_cache(file, BLOCK) == is_direct(file)
    system.use_page_cache(file)
    assert not is_direct(file)


def test_a_file_system_that_wants_whole_large_pages_is_refused(file, monkeypatch):
    def read(handle, buffers, offset):
        if offset % (16 * BLOCK):
            raise OSError(errno.EINVAL, "Invalid argument")
        return BLOCK

    monkeypatch.setattr(os, "preadv", read)
    assert not system.bypass_page_cache(file, BLOCK)
    assert not is_direct(file)


def test_macos_turns_the_cache_off(file, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *arguments: calls.append(arguments))
    assert system.bypass_page_cache(file, BLOCK)
    system.use_page_cache(file)
    assert calls == [(file, 48, 1), (file, 48, 0)]


def failing(function, number, name, folder):
    """``function`` as it is while ``folder``'s file ``name`` can't be read."""
    path = folder / name

    def call(file, *arguments, **named):
        target = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        if os.path.realpath(target) == os.path.realpath(path):
            raise OSError(number, os.strerror(number))
        return function(file, *arguments, **named)

    return call


def fail(monkeypatch, call, number, name, folder):
    module, _, function = call.rpartition(".")
    original = getattr(__import__(module), function)
    monkeypatch.setattr(call, failing(original, number, name, folder))


NUMBERS = [errno.EIO, errno.EACCES, errno.EMFILE]
READ = ["config.json", "tokenizer.json", RESIDENT, layer_file(2)]


@pytest.mark.parametrize(
    ("name", "call"), [("slotmoe.json", "builtins.open"), *product(READ, ["os.open", "os.preadv"])]
)
def test_opening_an_export(sample_export, monkeypatch, name, call):
    # A file system that refuses direct reads is asked again without.
    monkeypatch.setattr(Export, "bypass_page_cache", lambda self: False)
    for number in NUMBERS:
        with monkeypatch.context() as patch:
            fail(patch, call, number, name, sample_export)
            with pytest.raises(SlotmoeError) as raised:
                Runtime.open(sample_export, context=64).close()
        told = str(raised.value)
        assert told.startswith(str(sample_export / name)) and os.strerror(number) in told
        assert not any(word in told for word in ("damaged", "truncated", "incomplete", "again"))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("call", ["builtins.open", "os.open", "os.preadv"])
def test_opening_a_checkpoint(monkeypatch, call, number):
    fail(monkeypatch, call, number, WEIGHTS, SAMPLE)

    def read_all():
        with open_checkpoint(SAMPLE) as checkpoint:
            for name in checkpoint.infos:
                checkpoint.rows(name, 0, 1)

    with pytest.raises(CheckpointError) as raised:
        read_all()
    told = str(raised.value)
    assert told == f"{SAMPLE / WEIGHTS}: can't be read ({os.strerror(number)})"


def test_the_library_of_safetensors_is_understood(monkeypatch):
    """It opens the file once more, by itself."""
    from safetensors import SafetensorError

    def refuse(*_, **__):
        raise SafetensorError("Error while opening: Too many open files (os error 24)")

    monkeypatch.setattr("slotmoe.model.checkpoint.shards.safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"can't be read .*Too many open files"):
        open_checkpoint(SAMPLE)


def test_short_reads_are_no_damage(sample_export, monkeypatch):
    """A header in two parts was called damage, and that of a checkpoint got another hash."""
    with open_checkpoint(SAMPLE) as checkpoint:
        wanted = list(checkpoint.headers())
    preadv = os.preadv

    def short(handle, buffers, offset):
        return preadv(handle, [buffers[0][: max(len(buffers[0]) // 2, 1)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    Export.open(sample_export).close()
    with open_checkpoint(SAMPLE) as checkpoint:
        assert list(checkpoint.headers()) == wanted


@pytest.mark.usefixtures("processes")
def test_stdout_on_a_full_disk():
    """It ended with code 120, and with Python's own remarks."""
    command = [sys.executable, "-m", "slotmoe", "verify", str(SAMPLE), "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "slotmoe: stdin or stdout: No space left on device\n"


def test_windows_tells_of_ctrl_c_in_a_thread_of_its_own(monkeypatch, capfd):
    """Which does all that there is to do: the main thread waits for a lock meanwhile."""
    calls, taken = [], []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    monkeypatch.setattr(atexit, "register", lambda *call: None)
    kernel = SimpleNamespace(SetConsoleCtrlHandler=lambda *given: calls.append(given))
    kernel.Sleep = calls.append
    monkeypatch.setattr(ctypes, "WinDLL", lambda name: kernel, raising=False)
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", lambda *_: lambda function: function, raising=False)
    monkeypatch.setattr(os, "kill", lambda process, code: sys.exit(code))
    found = spec_from_file_location("on_windows", Path(system.__path__[0]).parent / "signals.py")
    signals = module_from_spec(found)
    found.loader.exec_module(signals)
    signals.take()
    ((strike, _),) = calls
    with ThreadPoolExecutor(1) as pool:
        with signals.Stopping(taken.append):
            assert pool.submit(strike, 2).result(60) and taken == [signal.SIGBREAK]
            assert calls[1:] == [-1]  # a closed window waits until the process has ended
        for event, code in ((0, 130), (0, 130), (5, 149)):  # the second while the first writes
            with pytest.raises(SystemExit, match=str(code)):
                pool.submit(strike, event).result(60)
    assert capfd.readouterr().err.count("interrupted") == 1
