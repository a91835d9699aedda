"""What ``slotmoe.system`` promises of files and memory on Windows."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

pytest.importorskip("msvcrt", reason="on Windows alone")

from slotmoe import system
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.machine import process_bytes

BLOCK = 4096


def read(handle, size, offset):
    data = memoryview(bytearray(size))
    return bytes(data[: system.read_at(handle, data, offset)])


def opened(path):
    handle = system.open_file(path, os.O_RDONLY)
    system.use_page_cache(handle)
    return handle


def test_reads_of_many_threads(tmp_path):
    data = random.Random(0).randbytes(1 << 22)
    path = tmp_path / "many"
    path.write_bytes(data)
    plain, overlapped = os.open(path, os.O_RDONLY | os.O_BINARY), opened(path)
    direct = opened(path)
    assert system.bypass_page_cache(direct, BLOCK)

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


def test_memory_counts_what_is_promised(tmp_path):
    before = process_bytes()
    memory = page_aligned(64 << 20)
    memory.fill_(1)  # Wine counts pages that were written
    assert (64 << 20) <= process_bytes() - before < 80 << 20
    assert system.peak_rss() >= before + len(memory)
    assert 0 < system.available_memory() <= psutil.virtual_memory().total
