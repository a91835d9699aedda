"""Exceptions at any line of a call: which lines it runs, and the same call with one of them
raising."""

import sys
from collections import Counter
from contextlib import contextmanager

from slotmoe.offload import runtime

# Files of the package whose lines count; its top-level folders are links.
_PACKAGE = runtime.__file__.rpartition("/offload/")[0]


def ours(filename):
    """Whether a file belongs to what computes."""
    return filename.startswith(_PACKAGE)


@contextmanager
def _tracing(on_line):
    """Call ``on_line(file, line)`` before each line of ours that this thread runs."""

    def local(frame, event, _):
        if event == "line":
            on_line(frame.f_code.co_filename, frame.f_lineno)
        return local

    def trace(frame, event, _):
        return local if ours(frame.f_code.co_filename) else None

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

    with _tracing(count):
        action()
    return times


class Interrupted(BaseException):
    """What ``interrupted_at`` raises: nothing catches it by name."""


def interrupted_at(line, moment, action, kind=Interrupted):
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
        with _tracing(count):
            action()
    except kind:
        return True
    return left <= 0  # swallowed on the way
