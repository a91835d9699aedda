"""Which tier a test is in follows from the fixtures that it requests, also through others.

A test may start a process, listen on loopback, run Triton's interpreter or transformers only if it
requests the fixture that says so; ``./check --fast`` runs the tests that request none of them.
Those that request ``nightly`` run with ``-m "slow or not slow"``.  What a test does without its
fixture fails it, so no list of tests has to be kept.
"""

import os
import sys
from collections import defaultdict
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from random import Random

import pytest

from tests.support.interpreter import keep_inside, quicken, shuffle

LEAVES = {"processes", "network", "interpreter", "oracle", "twin", "heavy"}
_TESTS = Path(__file__).parents[1]
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
_NEEDS = {**dict.fromkeys(_STARTS, "processes"), "socket.bind": "network", "tests.twin": "twin"}
_IMPORTS = {"slotmoe.quant.kernels.triton": "interpreter", "transformers": "oracle"}


class Guard:
    """Refuses what the running test has no fixture for, where it happens."""

    def __init__(self):
        self.given = None  # names of the running test's fixtures; None between tests
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.given is None:
            return
        need = _IMPORTS.get(arguments[0]) if event == "import" else _NEEDS.get(event)
        if need and need not in self.given:
            pytest.fail(f"{event} {arguments[:1]}: the test must request the fixture {need!r}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if item.path.is_relative_to(_TESTS):  # campaigns may do anything
            self.given = frozenset(item.fixturenames)
        try:
            return (yield)
        finally:
            self.given = None


def pytest_addoption(parser):
    text = "run files, and the tests of each, in the random order of this seed"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=text)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    if (seed := config.getoption("--shuffle")) is not None:
        chance = Random(seed)
        of_file = defaultdict(list)
        for item in items:
            of_file[item.path].append(item)
        files = list(of_file.values())
        for tests in (files, *files):
            chance.shuffle(tests)
        items[:] = chain.from_iterable(files)
    for item in items:
        if LEAVES & set(item.fixturenames):
            item.add_marker("full")
        if "nightly" in item.fixturenames:
            item.add_marker("slow")


def pytest_configure(config):
    config.pluginmanager.register(Guard())


@pytest.fixture(scope="session")
def processes():
    """Leave to start processes."""


@pytest.fixture(scope="session")
def network():
    """Leave to listen on loopback."""


@pytest.fixture(scope="session")
def interpreter(pytestconfig):
    """Leave to run Triton's interpreter, which then does without what it does over and over, runs
    programs in a random order, and refuses addresses outside of a launch's memory."""
    if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
        quicken()
        shuffle(pytestconfig.getoption("--shuffle"))
        keep_inside()


@pytest.fixture(scope="session")
def oracle():
    """Leave to run transformers."""


@pytest.fixture(scope="session")
def twin():
    """Leave to simulate a GPU."""


@pytest.fixture(scope="session")
def heavy():
    """Leave to compute for half a second or more."""


@pytest.fixture(scope="session")
def nightly():
    """Too long for each change."""
