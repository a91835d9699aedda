"""Whatever kills leave resumes to the same bytes; 2,000 by ``python -m tests.faults.kills``."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slotmoe.offload.sessions import blocks
from slotmoe.quant.export.writer import ExportFile
from tests.faults import kills
from tests.faults.campaign import ROOT
from tests.support.disk import memory
from tests.support.tiny import SMALL, write_checkpoint


def test_some_kills():
    """By a process without threads, which forks."""
    command = [sys.executable, "-m", "tests.faults.kills", "--count", "12", "--stride", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [work["work"] for work in found] == sorted([*kills.WORKS] * 2)
    assert all(work["killed"] >= 4 for work in found)


def written_in_place(path, parts):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(parts))


PLANTED = {
    "a block is not made durable": ("session", 1, blocks, "write_private", written_in_place),
    "an export is not made durable": ("quantize", 25, ExportFile, "sync", lambda file: None),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore:.*fork")
def test_planted_defects_are_found(name, monkeypatch):
    """By power cuts."""
    work, first, *broken = PLANTED[name]
    monkeypatch.setattr(*broken)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        write_checkpoint(Path(folder) / "source", **SMALL)
        place = Path(folder) / "source", Path(folder) / "work"
        found = kills.attacked(work, *place, 99, power=True, change=first)
    assert found["wrong"]
