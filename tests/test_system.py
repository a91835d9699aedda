"""What differs between systems: cores, and reads past the page cache."""

import errno
import fcntl
import os
import sys

import pytest

from slotmoe import system

BLOCK = 4096


@pytest.mark.parametrize(
    ("physical", "allowed", "quota", "cores"),
    [
        (64, 128, "max 100000", 64),
        (64, 3, "max 100000", 3),
        (64, 64, "350000 100000", 4),
        (64, 64, "20000 100000", 1),
        (None, 2, "not a number", 2),
    ],
)
def test_cores(physical, allowed, quota, cores, monkeypatch, tmp_path):
    monkeypatch.setattr(system.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))
    monkeypatch.setattr(system, "_CPU_LIMIT", tmp_path / "cpu.max")
    assert system.cores() == min(physical or 8, allowed)
    (tmp_path / "cpu.max").write_text(quota)
    assert system.cores() == cores


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
