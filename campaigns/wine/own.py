"""Runs inside Wine: what ``slotmoe.system`` promises of files and memory on Windows.

Prints ``{"wrong": [...]}``, a line for each check that failed.
"""

import ctypes
import gc
import json
import msvcrt
import os
import random
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from slotmoe import system
from slotmoe.offload.devices.pages import Arena, page_aligned
from slotmoe.system import windows

BLOCK, KERNEL = 4096, windows._KERNEL
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def read(handle, size, offset):
    data = memoryview(bytearray(size))
    return bytes(data[: system.read_at(handle, data, offset)])


def mode(handle):
    """How a file was opened: whether its reads wait for each other, and go past the cache."""
    status, found = (ctypes.c_uint64 * 2)(), ctypes.c_uint32()
    file, kind = ctypes.c_void_p(msvcrt.get_osfhandle(handle)), 16
    query = ctypes.WinDLL("ntdll").NtQueryInformationFile
    assert query(file, status, ctypes.byref(found), 4, kind) == 0
    return bool(found.value & 0x30), bool(found.value & 0x8)


def new_file(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


@check
def reads_of_many_threads(folder):
    data = random.Random(0).randbytes(1 << 22)
    path = new_file(folder, "many", data)
    plain, overlapped = os.open(path, os.O_RDONLY | os.O_BINARY), system.open_to_read(path)
    direct = system.open_to_read(path)
    assert system.bypass_page_cache(direct, BLOCK)
    modes = (True, False), (False, False), (False, True)
    assert tuple(map(mode, (plain, overlapped, direct))) == modes
    back = os.dup(direct)
    system.use_page_cache(back)
    assert mode(back) == (False, False)
    os.close(back)

    def reads(seed):
        order = random.Random(seed)
        for _ in range(50):
            handle = order.choice((plain, overlapped, direct))
            offset, size = order.randrange(1000) * BLOCK, order.randrange(1, 24) * BLOCK
            assert read(handle, size, offset) == data[offset : offset + size], (offset, size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reads, range(8)))
    for handle in (plain, overlapped, direct):
        assert read(handle, BLOCK, len(data) - 1000) == data[-1000:]
        assert read(handle, BLOCK, len(data)) == read(handle, BLOCK, 1 << 40) == b""
        assert os.fstat(handle).st_size == len(data)
        os.close(handle)


@check
def several_in_flight(folder):
    """Where reads wait for each other, so would the write that ends these."""
    name, duplex, overlapped = r"\\.\pipe\slotmoe-own", 3, 0x40000000
    KERNEL.CreateNamedPipeW.restype = KERNEL.CreateFileW.restype = ctypes.c_void_p
    server = KERNEL.CreateNamedPipeW(name, duplex | overlapped, 0, 1, 4096, 4096, 0, None)
    client = KERNEL.CreateFileW(name, 0xC0000000, 0, None, 3, overlapped, None)
    ends = [msvcrt.open_osfhandle(handle, os.O_BINARY) for handle in (server, client)]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(read, end, 1, 0) for end in (*ends, *ends)]
        for end in (*ends, *ends):
            system.write_at(end, memoryview(b"x"), 0)
        assert [future.result(30) for future in waiting] == [b"x"] * 4


@check
def an_exception_strikes_a_read(folder):
    handle = system.open_to_read(new_file(folder, "struck", bytes(range(256))))

    def strike(*arguments):
        KERNEL.ReadFile(*arguments)
        raise KeyboardInterrupt

    try:
        windows._transfers.run(strike, handle, memoryview(bytearray(16)), 0)
    except KeyboardInterrupt:
        assert windows._transfers._memory is not None
    assert read(handle, 4, 7) == bytes(range(7, 11)) and windows._transfers._memory is None


@check
def threads_leave_no_events(folder):
    handle, events = system.open_to_read(new_file(folder, "threads", b"abc")), []

    def in_a_thread():
        assert read(handle, 3, 0) == b"abc"
        events.append(windows._transfers._at.event)
        assert KERNEL.SetEvent(ctypes.c_void_p(events[0]))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert events and not KERNEL.SetEvent(ctypes.c_void_p(events[0]))


@check
def large_sectors_and_refusals(folder):
    """The file stays as it was, and is read through the cache."""
    handle = system.open_to_read(new_file(folder, "sectors", bytes(range(256)) * 64))

    def answer(file, kind, facts, size):
        facts[0] = 2 * BLOCK
        return True

    def refuse(*arguments):
        raise ctypes.WinError(87)

    for owner, name, fake in (
        (KERNEL, "GetFileInformationByHandleEx", answer),
        (windows._Transfers, "run", refuse),
        (KERNEL, "ReOpenFile", lambda *arguments: ctypes.c_void_p(-1).value),
    ):
        original = getattr(owner, name)
        setattr(owner, name, fake)
        try:
            assert not system.bypass_page_cache(handle, BLOCK), name
        finally:
            setattr(owner, name, original)
        assert read(handle, 3, 5) == bytes((5, 6, 7)) and mode(handle) == (False, False), name


@check
def a_file_over_4_gib(folder):
    path, there = folder / "long", (5 << 30) + 12345
    handle = os.open(path, os.O_RDWR | os.O_CREAT | system.NO_LINK)
    system.write_at(handle, memoryview(b"far away"), there)
    assert read(handle, 100, there) == b"far away" and read(handle, 8, there - (4 << 30)) == bytes(
        8
    )
    os.close(handle)


class Region(ctypes.Structure):
    """``MEMORY_BASIC_INFORMATION``."""

    _fields_ = (
        *(("base", ctypes.c_void_p), ("start", ctypes.c_void_p), ("asked", ctypes.c_uint64)),
        *(("size", ctypes.c_size_t), ("state", ctypes.c_uint32), ("protect", ctypes.c_uint32)),
        *(("type", ctypes.c_uint32), ("_", ctypes.c_uint32)),
    )


def state(address):
    """``committed``, ``reserved`` or ``free``, and ``private`` or not."""
    region = Region()
    sizes = ctypes.c_void_p(address), ctypes.byref(region), ctypes.c_size_t(ctypes.sizeof(region))
    assert KERNEL.VirtualQuery(*sizes)
    names = {0x1000: "committed", 0x2000: "reserved", 0x10000: "free"}
    return names[region.state], region.type == 0x20000


@check
def memory_is_private_and_freed(folder):
    memory = page_aligned((5 << 20) + 1)
    view, address = memory[100:].numpy().data, memory.data_ptr()
    del memory
    assert not any(view) and state(address) == ("committed", True)
    system.hold(address, 1 << 20)
    assert windows._held == {address: 1 << 20}
    del view
    assert state(address)[0] == "free" and not windows._held
    try:
        system.private_pages(0, True, True)
    except OSError:
        return
    raise AssertionError("nothing was given")


@check
def what_is_not_whole_is_committed_by_parts(folder):
    arena = Arena(stays=True)
    first, none = arena.empty((3, 1000), torch.float32), arena.empty((0,), torch.int8)
    start = first.data_ptr()
    assert state(start) == ("committed", True) and none.numel() == 0
    assert state(start + (1 << 20)) == ("reserved", True) and windows._held == {start: 12000}
    second = arena.empty((1 << 20,), torch.uint8)
    assert int(second.sum()) == int(first.sum()) == 0
    del arena, first, none, second
    assert state(start)[0] == "free" and not windows._held


@check
def large_pages_that_fail_are_small_ones(folder):
    right, windows._large_page = windows._large_page, lambda: 2 << 20
    try:
        memory = page_aligned(3 << 20)
        assert state(memory.data_ptr()) == ("committed", True) and int(memory.sum()) == 0
    finally:
        windows._large_page = right
    assert windows._large_page() in (0, 2 << 20)


@check
def memory_counts_what_is_promised(folder):
    before = system.process_bytes()
    memory = page_aligned(64 << 20)
    memory.fill_(1)  # Wine counts pages that were written
    assert (64 << 20) <= system.process_bytes() - before < 80 << 20
    assert system.peak_rss() >= before + len(memory)
    assert 0 < system.available_memory() <= psutil.virtual_memory().total


def main():
    wrong = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for function in CHECKS:
            try:
                function(Path(name))
            except Exception:
                last = traceback.format_exc(limit=-1).strip().splitlines()
                wrong.append(f"{function.__name__}: {' '.join(last[1:])}")
            gc.collect()
    print(json.dumps({"wrong": wrong}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
