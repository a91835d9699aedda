"""Saves and restores beside other texts: whatever is asked inside their file operations, each text
and each block on disk is that of an engine alone."""

import errno
import os
import sys
import threading
from contextlib import contextmanager
from itertools import count

import pytest

from slotmoe.offload.runtime import Runtime

FIRST = [id % 4000 for id in range(7, 7 + 13 * 150, 13)]
COUNT = 4  # tokens of each answer
# What a save and a restore do with files; "fstat" stands in for "fsync", which costs time.
DONE = {"stat", "scandir", "mkdir", "open", "flock", "fstat", "preadv", "pwrite", "write", "rename"}
DONE |= {"unlink", "close", "utime", "readinto"}


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


def test_no_file_operation_that_fails_costs_more_than_its_block(
    small_export, tmp_path, monkeypatch, heavy
):
    """Of a save, then of a restore and the save behind it; the next text is kept again."""
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
            for number in count(1):
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
    assert DONE - {*failed} == {"close"}


def test_what_a_failed_engine_holds_is_not_kept(small_export, tmp_path, monkeypatch):
    """A defect has ended it in the second pass, so nobody knows what the state is worth."""
    with Runtime.open(small_export, context=256) as runtime:
        runtime.keep_in(tmp_path)
        passes, begun = runtime.engine.batch.passes, count(1)
        run = passes.run

        def fail(rows):
            assert next(begun) < 2, "a defect"
            run(rows)

        monkeypatch.setattr(passes, "run", fail)
        with pytest.raises(AssertionError, match="a defect"):
            runtime.generate(FIRST[:50], COUNT).read()
    assert not [path for path in tmp_path.rglob("*-*") if path.is_file()]
