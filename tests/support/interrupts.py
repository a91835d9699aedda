"""Exceptions at any line of a call: which lines it runs, and the same call with one of them
raising."""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache

from slotmoe.offload import runtime

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
    file, number = line
    return code.co_filename == file and number in {at for *_, at in code.co_lines()}


def interrupted_at(line, moment, action, kind):
    """Run ``action`` and raise ``kind`` before it runs ``line`` for the ``moment``-th time (from
    1 on); whether that came to pass."""
    left = moment

    def count(*now):
        nonlocal left
        if now == line:
            left -= 1
            if left == 0:
                raise kind

    try:
        with _tracing(count, lambda code: _has(code, line)):
            action()
    except kind:
        return True
    return left <= 0  # swallowed on the way
