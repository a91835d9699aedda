"""What ``slotmoe.system`` promises of files and memory on Windows."""

# ruff: noqa: E402

import ctypes
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

msvcrt = pytest.importorskip("msvcrt", reason="on Windows alone")

from slotmoe import system
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.machine import process_bytes
from slotmoe.system import windows

BLOCK, KERNEL = 4096, windows._KERNEL


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


def opened(path):
    handle = system.open_file(path, os.O_RDONLY)
    system.use_page_cache(handle)
    return handle


def new_file(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def test_reads_of_many_threads(tmp_path):
    data = random.Random(0).randbytes(1 << 22)
    path = new_file(tmp_path, "many", data)
    plain, overlapped = os.open(path, os.O_RDONLY | os.O_BINARY), opened(path)
    direct = opened(path)
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


def test_an_exception_strikes_a_read(tmp_path):
    """Windows may still write: the memory is kept, and the event serves no other read."""
    handle = opened(new_file(tmp_path, "struck", bytes(range(256))))
    before = len(windows._in_flight)

    def strike(*arguments):
        KERNEL.ReadFile(*arguments)
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        windows._transfer(strike, handle, memoryview(bytearray(16)), 0)
    assert len(windows._in_flight) == before + 1
    assert read(handle, 4, 7) == bytes(range(7, 11))
    struck = [id(it) for it, _ in windows._in_flight.values()]
    assert len(struck) == before + 1 and not {id(it) for it in windows._idle} & set(struck)


def test_large_sectors_and_refusals(tmp_path):
    """The file stays as it was, and is read through the cache."""
    handle = opened(new_file(tmp_path, "sectors", bytes(range(256)) * 64))

    def answer(file, kind, facts, size):
        facts[0] = 2 * BLOCK
        return True

    def refuse(*arguments):
        raise ctypes.WinError(87)

    for owner, name, fake in (
        (KERNEL, "GetFileInformationByHandleEx", answer),
        (windows, "_transfer", refuse),
        (KERNEL, "ReOpenFile", lambda *arguments: ctypes.c_void_p(-1).value),
    ):
        usual = getattr(owner, name)
        setattr(owner, name, fake)
        try:
            assert not system.bypass_page_cache(handle, BLOCK), name
        finally:
            setattr(owner, name, usual)
        assert read(handle, 3, 5) == bytes((5, 6, 7)) and mode(handle) == (False, False), name


def test_a_file_over_4_gib(tmp_path):
    path, there = tmp_path / "long", (5 << 30) + 12345
    handle = os.open(path, os.O_RDWR | os.O_CREAT | system.NO_LINK)
    system.write_at(handle, memoryview(b"far away"), there)
    assert read(handle, 100, there) == b"far away"
    assert not any(read(handle, 8, there - (4 << 30)))
    os.close(handle)


def test_memory_counts_what_is_promised(tmp_path):
    before = process_bytes()
    memory = page_aligned(64 << 20)
    memory.fill_(1)  # Wine counts pages that were written
    assert (64 << 20) <= process_bytes() - before < 80 << 20
    assert system.peak_rss() >= before + len(memory)
    assert 0 < system.available_memory() <= psutil.virtual_memory().total
