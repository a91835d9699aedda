"""Exceptions at any line of a call: which lines it runs, and the same call with one of them
raising.  What must hold after that."""

import signal
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache

import torch

from slotmoe.offload import runtime
from slotmoe.offload.experts import disk
from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, whole
from tests.support.twin import Twin, open_on, slow

PASSES = [IDS[:12], [7], [8]]
CTRL_C = signal.SIGINT
SHORT = [IDS[:4], [7]]  # plain torch, as the twin of a GPU has it, is slow
# Files of the package whose lines count; its top-level folders are links.
_PACKAGE = runtime.__file__.rpartition("/offload/")[0]


@contextmanager
def _tracing(on_line, wanted):
    """Call ``on_line(file, line)`` before each line that this thread runs in ``wanted`` code."""

    def local(frame, event, _):
        if event == "line":
            on_line(frame.f_code.co_filename, frame.f_lineno)
        return local

    def trace(frame, event, _):
        return local if wanted(frame.f_code) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(action):
    """How often ``action`` runs each line of ours: (file, line) -> times."""
    times = Counter()

    def count(*line):
        times[line] += 1

    with _tracing(count, lambda code: code.co_filename.startswith(_PACKAGE)):
        action()
    return times


@cache
def _has(code, line):
    """Whether ``line`` is one of ``code``'s."""
    return line[1] in {at for *_, at in code.co_lines()}


def interrupted_at(line, moment, action, kind):
    """Run ``action`` and raise ``kind``, or send ``CTRL_C``, before it runs ``line`` for the
    ``moment``-th time (from 1 on); whether that came to pass."""
    left, raised = moment, KeyboardInterrupt if kind is CTRL_C else kind

    def count(*now):
        nonlocal left
        left -= now == line
        if now == line and left == 0:
            if kind is not CTRL_C:
                raise kind
            signal.raise_signal(kind)  # may come later, at a layer's end

    try:
        with _tracing(count, lambda code: code.co_filename == line[0] and _has(code, line)):
            action()
    except raised:
        return True
    return left <= 0  # swallowed on the way


def compute(runtime):
    """Prefill and decode: all logits."""
    passes = PASSES if runtime.model.device.tier == "ram" else SHORT
    first = runtime.sequences[0]
    first.rewind(0)
    return torch.cat([first.append(ids).clone() for ids in passes])


def on_threads(export, monkeypatch):
    """Every record is read by the threads, in several pieces."""
    monkeypatch.setattr(disk, "HELP_BYTES", 0)
    monkeypatch.setattr(disk, "PIECE_BYTES", 8192)
    return Runtime.open(export, context=256, slots=22)


def on_gpu(export, mode):
    return open_on(export, Twin(slow), 40, misses=mode, slots=40, kernels="torch")


KINDS = {
    "helping": lambda export, monkeypatch: Runtime.open(export, context=256, slots=22),
    "threads": on_threads,
    "gpu": lambda export, monkeypatch: on_gpu(export, "fetch"),
    "hybrid": lambda export, monkeypatch: on_gpu(export, "hybrid"),
}


def check(runtime, want, exact=True):
    """The next pass is right and no slot is lost."""
    whole(runtime)
    found = compute(runtime)
    assert torch.equal(found, want) if exact else torch.allclose(found, want, rtol=1e-2, atol=1e-2)
    whole(runtime)


def interrupt(runtime, chosen, exact, enough=None):
    """Interrupt a computation at each (line, moment) of ``chosen``, until so many came while one
    ran; how many did."""
    want, came, handler = compute(runtime), 0, signal.getsignal(CTRL_C)
    for number, (line, moment) in enumerate(chosen):
        if came == enough:
            break
        kind = (KeyboardInterrupt, CTRL_C, RuntimeError)[number % 3]
        with suppress(Exception):  # another error that this one has led to
            came += interrupted_at(line, moment, lambda: compute(runtime), kind)
        try:
            assert signal.getsignal(CTRL_C) is handler
            check(runtime, want, exact)
        except Exception as problem:
            raise AssertionError(f"after {kind} at {line}, time {moment}") from problem
    return came
