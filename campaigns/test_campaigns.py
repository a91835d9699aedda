"""Each campaign finds nothing wrong in a few seconds, and finds a defect that is planted."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = [
    "system-calls quantize chat --count 1",
    "fuzz --blind --seconds 2",
    "fuzz config --seconds 2",
    "flips --count 1000",
    "interrupts helping threads --count 20",
    "kills --count 8",
    "races --count 2",
    "environments 'no home' 'few descriptors'",
    "soak --count 200",
    "server --clients 10 --seconds 20",
]


def played(line, before=""):
    """Exit code and reports of a campaign, after the code ``before``."""
    program = f"{before}\nfrom campaigns.__main__ import main\nmain()"
    command = [sys.executable, "-c", program, *shlex.split(line), "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, [json.loads(report) for report in done.stdout.splitlines()]


def test_no_campaign_shrinks():
    """What was attacked once is attacked for good."""
    least = {"system-calls": 7, "fuzz": 21, "interrupts": 8, "kills": 4, "races": 5}
    for name, parts in {**least, "environments": 26, "clients": 18}.items():
        attack = import_module(f"campaigns.{name.replace('-', '_')}").ATTACK
        assert len(attack.parts) >= parts, name


def test_every_test_that_the_page_names_is_there():
    """Each past defect has its reproducer."""
    sources = "".join(path.read_text() for path in ROOT.glob("[tc]*/**/test_*.py"))
    named = {*re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())}
    assert named and named <= {*re.findall(r"def (test_\w+)\(", sources)}


@pytest.mark.parametrize("line", SHORT)
def test_nothing_is_wrong(line):
    code, reports = played(line)
    assert code == 0, reports


FUZZ = """
import os
import campaigns.fuzz, campaigns.parsers
campaigns.fuzz.HANGS = 1
def crash(data):
    import faulthandler
    faulthandler.disable()
    os.abort()
def hang(data):
    while data: pass
def hoard(data):
    return [bytes(1 << 20) for _ in range(1000)]
def fail(data):
    raise KeyError(data)
def leak(data):
    return os.dup(2)
seen = []
def planted(folder):
    return [{"a": 1}], lambda data: not seen.append(data) if not seen else BROKEN(data)
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
SHORT_WRITES = """
import os
from slotmoe.quant.export import writer
writer.ExportFile._pwrite = lambda file, data, at: os.pwrite(file._handle, data, at)
"""
QUIET_SYNC = """
from contextlib import suppress
from slotmoe.quant.export import writer
sync = writer.ExportFile.sync
def quiet(file):
    with suppress(Exception):
        sync(file)
writer.ExportFile.sync = quiet
"""
IN_THE_WAY = """
import os
from slotmoe.quant.export import writer
begin = writer.ExportFile.__init__
def alone(file, path, *rest):
    path.parent.mkdir(exist_ok=True)
    os.close(os.open(writer.temporary_name(path), os.O_CREAT | os.O_EXCL))
    begin(file, path, *rest)
writer.ExportFile.__init__ = alone
"""
IN_PLACE = """
from slotmoe.offload.sessions import blocks
def written(path, parts):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(parts))
blocks.write_private = written
"""
NO_SYNC = """
from slotmoe.quant.export.writer import ExportFile
ExportFile.sync = lambda file: None
"""
UNCHECKED = """
from slotmoe.quant.export.folder import Folder
from slotmoe.quant.export.reader import Export
from slotmoe.offload.sessions import names
from slotmoe.offload.sessions.blocks import BlockFolder
def latents(folder, path, block, token_bytes):
    return memoryview(path.read_bytes())[len(block.head(token_bytes)) : -16]
def small_file(export, name, _):
    return (export.folder / name).read_bytes()
"""
HALF = """
from slotmoe.offload.tiers.slots import Table
restore = Table.restore
def half(table, *arguments, **options):
    free = table.free
    restore(table, *arguments, **options)
    table.free = free
Table.restore = half
"""
OTHER_TEXT = """
from campaigns import server
alone = server.texts_alone
def other(export):
    return {prompt: ["~", *texts] for prompt, texts in alone(export).items()}
server.texts_alone, server.SETTLING = other, 5
"""
PLANTED = {
    "a crash": ("fuzz config --blind", FUZZ.replace("BROKEN", "crash"), "ended with -6"),
    "a hang": ("fuzz config --blind", FUZZ.replace("BROKEN", "hang"), "ended with -14"),
    "memory": ("fuzz config --blind", FUZZ.replace("BROKEN", "hoard"), "MemoryError"),
    "an exception": ("fuzz config --blind", FUZZ.replace("BROKEN", "fail"), "KeyError"),
    "a descriptor": ("fuzz config --blind", FUZZ.replace("BROKEN", "leak"), "left a file open"),
    "deep code": ("fuzz config --count 30000", DEEP, "KeyError"),
    "a short write": ("system-calls quantize --count 3", SHORT_WRITES, "short"),
    "a failed fsync": ("system-calls quantize --kinds unsynced", QUIET_SYNC, "not said"),
    "leavings of a kill": ("system-calls quantize --count 3", IN_THE_WAY, "does not resume"),
    "a block without fsync": ("kills session-power --count 9", IN_PLACE, "change"),
    "an export without fsync": ("kills quantize-power", NO_SYNC, "change"),
    "unchecked tensors": ("flips", f"{UNCHECKED}\nExport._verify = lambda *_: None", "missed"),
    "unchecked headers": (
        "flips",
        f"{UNCHECKED}\nFolder.verify_header = lambda *_: None",
        "missed",
    ),
    "unchecked small files": ("flips", f"{UNCHECKED}\nExport.small_file = small_file", "missed"),
    "unchecked blocks": ("flips", f"{UNCHECKED}\nBlockFolder._latents = latents", "missed"),
    "unchecked names": (
        "flips",
        f"{UNCHECKED}\nnames._checksum = lambda values: values.get('checksum', '')",
        "missed",
    ),
    "a slot that is lost": ("interrupts helping --count 200", HALF, "AssertionError"),
    "no locks": ("races --count 60", "import fcntl\nfcntl.flock = lambda *_: None", ""),
    "a wrong answer": ("server --clients 5 --seconds 5", OTHER_TEXT, "and alone"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name):
    line, before, wanted = PLANTED[name]
    if name == "deep code":
        pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
        assert played(f"{line} --blind", before)[0] == 0
    code, reports = played(line + " --count 3000" * (line == "flips"), before)
    assert code == 1
    for report in reports:
        assert any(wanted in problem for problem in report["wrong"]), report
