"""Each campaign finds nothing wrong in a few seconds, and finds a defect that is planted."""

import json
import shlex
import sys
from functools import partial
from importlib import import_module
from subprocess import PIPE, Popen

import pytest

from campaigns import fuzz, parsers, wine
from tests.support.forkserver import ROOT, Forked

# What takes a second or two of CI, and more of these and others at night.
USUAL = ["system-calls verify --count 1", "kills --count 1", "races --count 1"]
SHORT = [
    "system-calls quantize chat --count 1",
    "fuzz --blind --seconds 2",
    "fuzz config --seconds 2",
    "interrupts --count 8",
    "kills --count 8",
    "races --count 2",
    "environments 'no home' 'few descriptors'",
    "escapes --count 1",
    "soak --count 200",
    "server requests --clients 10 --seconds 20",
    "server schema grammar regex choice template stop --count 30",
]


def played(line, before=""):
    """Exit code and reports of a campaign, after the code ``before``."""
    program = f"{before}\nfrom campaigns.__main__ import main\nmain()"
    words = [*shlex.split(line), "--seed", "1"]
    command = [sys.executable, "-c", program, *words]
    alone = words[0] not in ("kills", "races")  # these start nothing anew and watch no import
    start = partial(Popen, command, cwd=ROOT, stdout=PIPE, stderr=PIPE)
    with start() if alone else Forked(*words, program=program) as child:
        out, err = child.communicate()
    assert out, err
    return child.returncode, [json.loads(report) for report in out.splitlines()]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "line", [*USUAL, *(pytest.param(it, marks=pytest.mark.slow) for it in SHORT)]
)
def test_nothing_is_wrong(line):
    code, reports = played(line)
    assert code == 0, reports


def test_no_campaign_shrinks():
    """What was attacked once is attacked for good."""
    least = {"system-calls": 7, "fuzz": 13, "interrupts": 14, "kills": 4, "races": 4}
    least |= {"environments": 26, "clients": 6, "escapes": 6, "server": 7}
    for name, parts in least.items():
        attack = import_module(f"campaigns.{name.replace('-', '_')}").ATTACK
        assert len(attack.parts) >= parts, name
    assert {*parsers.PARSERS} == {*fuzz.PARTS}


def test_wine_has_a_version_of_each_package():
    assert wine.pins()["numpy"] == "2.1.3" and len(wine.pins()) > 40


FUZZ = """
import os, time
import campaigns.fuzz, campaigns.parsers
campaigns.fuzz.HANGS, seen = 1, []
def planted(folder):
    return [{"a": 1}], lambda data: not seen.append(data) if not seen else BROKEN
campaigns.parsers.PARSERS["config"] = planted
"""
# Six letters in their places are found one by one, by the code that is reached, and not by chance.
DEEP = """
import atheris, campaigns.parsers
@atheris.instrument_func
def deep(data):
    first = data[0:1] == b"{" and data[1:2] == b"[" and data[2:3] == b","
    if first and data[3:4] == b"\\xff" and data[4:5] == b"{" and data[5:6] == b",":
        raise KeyError(data)
    return True
campaigns.parsers.PARSERS["config"] = lambda folder: ([b"........"], deep)
"""
QUIET_SYNC = """
from contextlib import suppress
from slotmoe.quant.export import writer
def quiet(file):
    with suppress(OSError):
        os.fsync(file._handle)
writer.ExportFile.sync = quiet
"""
NO_SYNC = """
from slotmoe.quant.export.writer import ExportFile
ExportFile.sync = lambda file: None
"""
LOST = """
from slotmoe.offload.engine.batch import Batch
finish = Batch._finish
def lost(batch, request, last):
    finish(batch, request, last)
    if last.finish == "cancelled" and len(batch._free) > 1:
        batch._free.pop()
Batch._finish = lost
"""
ANY_SIZE = """
from campaigns import fuzz
from slotmoe.model import tokenizer
from slotmoe.tools.serve import grammar
fuzz.ODD = ["20000000"]
tokenizer._SPARE_IDS = tokenizer.MAX_TOKENIZER_VALUES = grammar._MAX_CHARACTERS = 1 << 60
"""
OTHER_TEXT = """
from campaigns import server
wanted = server.wanted_of
def other(*given):
    return {prompt: ["~", *texts] for prompt, texts in wanted(*given).items()}
server.wanted_of, server.SETTLING = other, 5
"""
NO_LOCKS = "import fcntl\nfcntl.flock = lambda *_: None"
PLANTED = {
    **{
        code: ("fuzz config --blind", FUZZ.replace("BROKEN", code), wrong)
        for code, wrong in {
            "os.abort()": "ended with -6",
            "time.sleep(99)": "ended with -14",
            "bytes(1 << 30)": "MemoryError",
            "os.dup(2) > 0": "left a file open",
        }.items()
    },
    "deep code": ("fuzz config --count 30000", DEEP, "KeyError"),
    "tables of any size": ("fuzz tokenizer --blind --count 3000", ANY_SIZE, ""),
    "a failed fsync": ("system-calls quantize --kinds unsynced", QUIET_SYNC, "not said"),
    "an export without fsync": ("kills quantize-power", NO_SYNC, "change"),
    "a sequence that is lost": ("soak --count 5000", LOST, ""),
    "no locks": ("races destination cache session sessions --count 60", NO_LOCKS, ""),
    "a wrong answer": ("server --clients 5 --seconds 5", OTHER_TEXT, "and alone"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name):
    line, before, wanted = PLANTED[name]
    if name == "deep code":
        pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
        assert played(f"{line} --blind", before)[0] == 0
    code, reports = played(line, before)
    assert code == 1
    for report in reports:
        assert any(wanted in problem for problem in report["wrong"]), report
