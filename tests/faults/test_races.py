"""Processes that do the same at once; a thousand rounds by ``python -m tests.faults.races``."""

import fcntl
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.faults import races
from tests.faults.campaign import ROOT
from tests.support.disk import memory
from tests.support.params import nth
from tests.support.tiny import SMALL, write_checkpoint


def test_some_rounds():
    """By a process without threads, which forks."""
    command = [sys.executable, "-m", "tests.faults.races", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [race["race"] for race in found] == [*races.RACES]


@pytest.mark.parametrize("name", nth(2, races.RACES))
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_lock_that_is_taken_out_is_missed(name, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        write_checkpoint(Path(folder) / "source", **SMALL)
        found = races.attacked(name, Path(folder) / "source", Path(folder) / "work", 60)
    assert found["wrong"]
