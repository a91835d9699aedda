"""What gets its final name is durable: a power cut leaves the old file or the whole new one."""

import errno
import os
import sys
import threading
from contextlib import contextmanager
from itertools import count

import pytest

from slotmoe.offload.ingest.output_dir import Resumption
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.repository import Snapshot
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved
from slotmoe.quant.export.writer import ExportFile
from tests.support.disk import per_token
from tests.support.tiny import SMALL, write_checkpoint


def write_export(folder):
    write_checkpoint(folder / "source", shards=2)
    quantize(folder / "source", folder / "export", workers=1)


def write_blocks(folder):
    store = BlockFolder(folder / "blocks", 1 << 20, print)
    blocks = list(chain(bytes(16), [*range(70)]))
    store.add(blocks, per_token(24), lambda block: memoryview(bytes(24 * len(block.tokens))))


def write_name(folder):
    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), [1, 2], "text", [{"role": "text", "content": "Hello"}]))


@pytest.mark.parametrize("write", [write_export, write_blocks, write_name])
def test_a_file_is_durable_before_it_gets_its_name(write, tmp_path, monkeypatch):
    synced, named, rename = set(), [], os.rename

    def checked_rename(path, name):
        for file in path.rglob("*") if path.is_dir() else [path]:
            assert file.is_dir() or file.stat().st_ino in synced, f"{file} may be lost"
            named.append(file)
        rename(path, name)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "rename", checked_rename)
    write(tmp_path)
    assert named


class Shards:
    """Weight files that come one after the other, and were here all along."""

    snapshot = Snapshot("org/model", "main", "a" * 40, {})

    def stamps(self, files):
        return dict.fromkeys(files, "hub x")

    def announce(self, portions, export_bytes, free_bytes):
        return 0

    def held(self, checkpoint, portions):
        yield from portions


def test_a_resumed_export_counts_only_on_what_is_durable(tmp_path, monkeypatch):
    synced, counts, sync, save = set(), [], ExportFile.sync, Resumption.save

    def noted_save(state, partial):
        assert {sum for item in state.written.values() for sum in item[0]} <= synced
        counts.append(len(state.written))
        save(state, partial)

    def noted_sync(file):
        whole = set(file.checksums.values())
        sync(file)
        synced.update(whole)

    monkeypatch.setattr(ExportFile, "sync", noted_sync)
    monkeypatch.setattr(Resumption, "save", noted_save)
    write_checkpoint(tmp_path / "source", shards=3, **SMALL)
    quantize(tmp_path / "source", tmp_path / "export", workers=1, shards=Shards())
    assert len({*counts}) > 3


# Saves and restores of sessions, each of whose file operations fails in turn

FIRST = [id % 4000 for id in range(7, 7 + 13 * 150, 13)]
COUNT = 4  # tokens of each answer


@contextmanager
def at_file_operations(runtime, act):
    """``act(name)`` before each file operation of sessions, in whichever thread."""

    def look(frame, event, function):
        if event != "c_call":
            return
        module = getattr(function, "__module__", None)
        if module is None:
            module = type(getattr(function, "__self__", None)).__module__
        name = function.__name__
        is_of_files = module in ("posix", "fcntl", "io", "_io")
        if not is_of_files or name.startswith(("_path", "fspath", "fileno")):
            return
        while frame is not None and "/sessions/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            act(name)

    threading.setprofile(look)
    sys.setprofile(look)
    runtime.engine.call(lambda: sys.setprofile(look))
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        runtime.engine.call(lambda: sys.setprofile(None))


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_file_operation_that_fails_costs_more_than_its_block(
    small_export, tmp_path, monkeypatch, heavy, step
):
    """Each ``step``-th of a save, then of a restore and the save behind it; the next text is kept
    again."""
    monkeypatch.setattr(os, "fsync", os.fstat)
    left, failed, other = 0, [], [*FIRST[:100], 9]

    def fail(name):
        nonlocal left
        left -= name not in ("close", "__exit__")
        if left == 0 and name not in ("close", "__exit__"):
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Runtime.open(small_export, context=256) as runtime:
        wanted = {
            prompt: [*runtime.generate(prompt, COUNT)] for prompt in map(tuple, (FIRST, other))
        }
        for before, prompt in (((), FIRST), ((FIRST, [*FIRST[:70], *range(5, 50)]), other)):
            for number in count(1, step):
                runtime.keep_in(tmp_path / f"{len(before)} {number}")
                for text in before:
                    runtime.engine.empty()
                    runtime.next_logits(text)
                runtime.engine.empty()
                left, known = number, len(failed)
                with at_file_operations(runtime, fail):
                    tokens = [*runtime.generate(prompt, COUNT)]
                assert tokens == wanted[tuple(prompt)], failed[-1:]
                if len(failed) == known:
                    break
                runtime.engine.empty()
                assert [*runtime.generate(prompt, COUNT)] == tokens
    assert len(failed) > 40 // step and len({*failed}) > 5
