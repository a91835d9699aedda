"""What differs between systems: reads past the page cache, short reads, a full disk."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from slotmoe import system
from slotmoe.model.checkpoint.reader import open_checkpoint
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
