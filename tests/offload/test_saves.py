"""Saves and restores of sessions, each of whose file operations fails in turn."""

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
