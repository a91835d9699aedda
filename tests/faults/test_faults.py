"""The campaign of system calls, at a few points; all of them with ``-m slow``, or by
``python -m tests.faults.campaign``."""

import json
import re
import shutil

import pytest

from tests.faults import environments, fuzz, kills, races
from tests.faults.campaign import COMMANDS, ROOT, run_preloaded
from tests.support.interrupts import KINDS

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def attacked(folder, *arguments):
    done = run_preloaded([*map(str, arguments)], folder)
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    return report["points"]


def test_no_campaign_shrinks():
    """What was attacked once is attacked for good."""
    assert len(COMMANDS) >= 7 and len(fuzz.PARSERS) >= 21 and len(KINDS) >= 4
    assert len(kills.WORKS) >= 2 and len(environments.WORLDS) >= 26
    assert len(environments.COMMANDS) >= 8 and len(races.RACES) >= 5


def test_every_test_that_the_page_names_is_there():
    """Each past defect has its reproducer, and each defence the test that misses it."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {*re.findall(r"def (test_\w+)\(", sources)}
    named = {*re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())}
    assert len(named) >= 50 and named <= tests, named - tests


@needs_compiler
def test_a_few_faults(tmp_path):
    points = attacked(tmp_path, "quantize", "chat", "--points", 1)
    assert len(points) == 2 * 9 and set(points.values()) == {1}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_system_call(command, tmp_path):
    points = attacked(tmp_path, command)
    print(json.dumps(points))
    assert sum(points.values()) >= {"quantize": 1000}.get(command, 50), "calls went uncounted"


PLANTED = {
    "a short write is not gone on with": "writer.ExportFile._pwrite = "
    "lambda file, data, at: os.pwrite(file._handle, data, at)",
    "a failed fsync is not said": "sync = writer.ExportFile.sync\n"
    "def quiet(file):\n"
    "    try:\n"
    "        sync(file)\n"
    "    except Exception:\n"
    "        pass\n"
    "writer.ExportFile.sync = quiet",
    "what a kill left is in the way": "begin = writer.ExportFile.__init__\n"
    "def alone(file, path, *rest):\n"
    "    path.parent.mkdir(exist_ok=True)\n"
    "    os.close(os.open(writer.temporary_name(path), os.O_CREAT | os.O_EXCL))\n"
    "    begin(file, path, *rest)\n"
    "writer.ExportFile.__init__ = alone",
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name, tmp_path):
    before = f"import os\nfrom slotmoe.quant.export import writer\n{PLANTED[name]}"
    points = ["--kinds", "unsynced"] if "fsync" in name else ["--points", "3"]
    done = run_preloaded(["quantize", *points], tmp_path, before)
    assert json.loads(done.stdout)["wrong"]
