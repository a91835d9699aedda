"""Processes that do the same at once; a thousand rounds by ``python -m tests.faults.races``.  They
are forks of a process without threads."""

import json
import subprocess
import sys

import pytest

from tests.faults import races
from tests.faults.campaign import ROOT

CHEAP = ("session", "sessions")  # which need no torch
WITHOUT_LOCKS = "import fcntl; fcntl.flock = lambda *_: None"


def played(names, before=""):
    program = f"{before}\nfrom tests.faults.races import main\nmain()"
    command = [sys.executable, "-c", program, *names, "--rounds", "60" if before else "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [race["race"] for race in found] == [*names], done.stderr
    assert done.returncode == any(race["wrong"] for race in found)
    return found


@pytest.mark.parametrize(
    "names", [CHEAP, pytest.param(tuple(races.RACES), marks=pytest.mark.slow)], ids=str
)
def test_some_rounds(names):
    assert not any(race["wrong"] for race in played(names))


@pytest.mark.parametrize(
    "names", [CHEAP, pytest.param(tuple(races.RACES), marks=pytest.mark.slow)], ids=str
)
def test_locks_that_are_taken_out_are_missed(names):
    assert all(race["wrong"] for race in played(names, WITHOUT_LOCKS))
