"""Saves and restores beside other texts: whatever is asked inside their file operations, each text
and each block on disk is that of an engine alone."""

import errno
import os
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from itertools import count

import pytest

from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import chain
from tests.support.engine import until
from tests.support.v4 import export_of

FIRST = [id % 4000 for id in range(7, 7 + 13 * 150, 13)]
COUNT = 4  # tokens of each answer
MOST = 70  # file operations in which another text starts: more than a save has
# What a save and a restore do with files; "fstat" stands in for "fsync", which costs time.
DONE = {"stat", "scandir", "mkdir", "open", "flock", "fstat", "preadv", "pwrite", "write", "rename"}
DONE |= {"unlink", "close", "utime", "readinto"}


@pytest.fixture(scope="module", params=["small", pytest.param("v4", marks=pytest.mark.slow)])
def export(request, tmp_path_factory):
    if request.param == "small":
        return request.getfixturevalue("small_export")
    return export_of(tmp_path_factory.mktemp("tiny"), request.param)


class Texts:
    """Texts that a ``runtime`` is asked for."""

    def __init__(self, runtime):
        self.runtime, self.asked, self.started, self.seen = runtime, [], 0, set()

    def ask(self, prompt):
        stream = self.runtime.generate(prompt, COUNT, top_logprobs=99)
        self.asked.append((prompt, stream))
        return stream

    def start_another(self, operation):
        """From another thread, one that begins as ``FIRST`` does, inside each of the first ``MOST``
        operations.  Wait for its end, if this is not the thread that makes it."""
        if self.started == MOST:
            return
        self.seen.add(operation)
        number, self.started, streams = self.started, self.started + 1, []
        prompt = [*FIRST[: 11 * number % 140], *range(100 + number, 130 + number)]
        thread = threading.Thread(target=lambda: streams.append(self.ask(prompt)))
        thread.start()
        thread.join()
        if threading.current_thread() is not self.runtime.engine._thread:
            until(lambda: streams[0]._deltas.qsize() == COUNT)


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


def blocks_of(root, tokens):
    """Whatever may be kept of ``tokens``, by address."""
    begun = (block.begun(n + 1) for block in chain(root, tokens) for n in range(len(block.tokens)))
    return {block.address.hex(): block for block in begun}


@pytest.mark.parametrize("sequences", [1, 2])
def test_texts_that_start_inside_a_save_or_a_restore_change_nothing(
    export, tmp_path, monkeypatch, heavy, sequences
):
    monkeypatch.setattr(os, "fsync", os.fstat)
    seen, said, made, restored = set(), [], defaultdict(list), []

    def opened():
        return Runtime.open(export, context=256, sequences=sequences)

    for _ in ("saved", "restored"):
        with opened() as runtime:
            runtime.keep_in(tmp_path, notify=said.append)
            texts = Texts(runtime)
            with at_file_operations(runtime, texts.start_another):
                texts.ask(FIRST)
                until(lambda texts=texts: texts.started == MOST)
            for prompt, stream in texts.asked:
                made[tuple(prompt)].append([*stream])
            seen |= texts.seen
    with opened() as runtime:
        runtime.keep_in(tmp_path, notify=said.append)
        root, before = runtime.sessions.root(), 0
        for prompt in made:
            runtime.engine.empty()
            made[prompt].append([*runtime.generate(prompt, COUNT, top_logprobs=99)])
            restored.append(runtime.sessions.stats()["restored_tokens"] - before)
            before += restored[-1]
    left = {path.name: path for path in tmp_path.rglob("*-*") if path.is_file()}
    with opened() as alone:
        if alone.stats()["kernels"] == "torch":
            pytest.skip("torch's products depend on the number of rows")
        state = alone.engine.batch.sequences[0].state
        for prompt, found in made.items():
            alone.engine.empty()
            tokens = [*alone.generate(prompt, COUNT, top_logprobs=99)]
            assert all(other == tokens for other in found), prompt
            whole = [*prompt, *(token.id for token in tokens)]
            known = blocks_of(root, whole)
            names = [name for name in left if name.split("-")[3] in known]
            for name in sorted(names, key=lambda name: name.endswith("-state")):
                block, content = known[name.split("-")[3]], left.pop(name).read_bytes()
                saved = state.saved(block.start, block.end)
                if name.endswith("-state"):
                    alone.engine.empty()
                    alone.next_logits(whole[: block.end])
                    saved = state.snapshot(block.end)
                assert content[-16 - len(saved) : -16] == saved.numpy().tobytes(), name
    assert restored == [len(prompt) - 1 for prompt in made] and not said
    assert not left and seen >= DONE


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
