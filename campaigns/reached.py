"""Which lines of the product a test reaches: a plugin of pytest's for ``campaigns.mutants``.

``campaigns.mutants`` copies this file into a copy of the tree and puts ``__reach__[number]`` before
each statement of the files in question.  The first look-up of a number writes it to a file.  So
threads, forks and other programs report what they run, and no trace function slows the tests.

A fixture that several tests share, and a cached function, run for the first of these tests alone.
What such a fixture reaches counts for each test that asks for it; caches of the product are emptied
before each test.
"""

import ctypes
import faulthandler
import functools
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

_FILE = "MUTANTS_FILE"  # environment: where a test process and what it starts write numbers


class Reach(dict):
    """The numbers that this process has looked up since the last ``clear``."""

    def __init__(self):
        super().__init__()
        self.write = os.write  # tests replace it in os
        self.file = None
        self.to(os.environ.get(_FILE))
        os.register_at_fork(after_in_child=self.clear)

    def to(self, path):
        self.file = path and os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __missing__(self, number):
        self[number] = 0
        if self.file:
            with suppress(OSError):  # a process without files
                self.write(self.file, b"%d\n" % number)
        return 0


REACH = Reach()


def empty_caches():
    """Empty what functions of the watched modules remember."""
    names = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    for value in [value for of in names if "__reach__" in of for value in of.values()]:
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


class Recorder:
    """Writes one line of JSON for each test: its id, seconds, outcome and lines."""

    def __init__(self, folder):
        self.numbers = folder / f"{os.getpid()}.numbers"
        self.records = open(folder / f"{os.getpid()}.json", "a", buffering=1)
        os.environ[_FILE] = str(self.numbers)
        REACH.to(self.numbers)
        self.offset, self.lines, self.shared = 0, set(), {}
        self.seconds, self.outcomes = 0.0, []

    def take(self):
        """Add to ``lines`` what was reached since the last call, and return it."""
        REACH.clear()
        with open(self.numbers, "rb") as file:
            file.seek(self.offset)
            read = file.read()
        self.offset += len(read)
        lines = {int(number) for number in read.split()}
        self.lines |= lines
        return lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.take()
        self.lines, self.outcomes, self.seconds = set(), [], 0.0
        empty_caches()
        if slowest := os.environ.get("MUTANTS_SLOWEST"):
            faulthandler.dump_traceback_later(float(slowest), exit=True, file=sys.__stderr__)
        begin = time.perf_counter()
        result = yield
        faulthandler.cancel_dump_traceback_later()
        seconds = time.perf_counter() - begin - self.seconds
        self.take()
        for fixtures in item._fixtureinfo.name2fixturedefs.values():
            for fixture in fixtures:
                self.lines |= self.shared.get(fixture, set())
        outcome = min(self.outcomes, key=("failed", "skipped", "passed").index)
        record = {"test": item.nodeid, "seconds": round(seconds, 3), "outcome": outcome}
        self.records.write(json.dumps(record | {"lines": sorted(self.lines)}) + "\n")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        self.take()
        begin, inner = time.perf_counter(), self.seconds
        try:
            return (yield)
        finally:
            self.shared[fixturedef] = self.shared.get(fixturedef, set()) | self.take()
            self.seconds = inner + time.perf_counter() - begin

    def pytest_runtest_logreport(self, report):
        # An expected failure counts as skipped.
        self.outcomes.append(report.outcome)


def pytest_configure(config):
    with suppress(OSError):  # where memory ends, the system kills a mutant before all else
        Path("/proc/self/oom_score_adj").write_text("1000")
    # The process that only hands out tests runs none.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Recorder(Path(os.environ["MUTANTS_FOLDER"])))


def run_pytest(root, places, arguments, output):
    """In a new process: in the tree ``root``, with the environment ``places``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when the campaign ends
    os.setsid()
    handle = os.open(output, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= places
    os.chdir(root)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.startswith("campaigns")]:
        del sys.modules[name]  # the checkout's
    imported = "ignore::pytest.PytestAssertRewriteWarning"
    sys.exit(pytest.main(["-p", "reached", "-W", imported, *arguments]))
