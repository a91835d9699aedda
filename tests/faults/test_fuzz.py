"""Every parser gets a few mutated inputs; longer by ``python -m tests.faults.fuzz``."""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.faults import fuzz
from tests.faults.campaign import ROOT


def test_every_parser(tmp_path):
    """In a process without threads, since each parser gets a fork of it."""
    arguments = ["--blind", "--seconds", "60", "--cases", "30", "--slow-cases", "3"]
    command = [sys.executable, "-m", "tests.faults.fuzz", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(fuzz.PARSERS)


def crash(data):
    import faulthandler

    faulthandler.disable()  # it would write into the tests' output
    os.abort()


def hang(data):
    total = 0
    while data:
        total += 1


def hoard(data):
    return len([bytes(1 << 20) for _ in range(1000)]) > 0


def fail(data):
    raise KeyError(data)


def leak(data):
    return os.dup(2) > 0


PLANTED = {
    "crash": (crash, "ended with -6"),
    "hang": (hang, "ended with -14"),
    "memory": (hoard, "MemoryError"),
    "exception": (fail, "KeyError"),
    "descriptor": (leak, "left a file open"),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore:.*fork")
def test_planted_defects_are_found(name, tmp_path, monkeypatch):
    broken, wanted = PLANTED[name]
    seen = []

    @contextmanager
    def parser(folder):
        yield [{"a": 1}], lambda data: not seen.append(data) if not seen else broken(data)

    monkeypatch.setitem(fuzz.PARSERS, "planted", parser)
    monkeypatch.setattr(fuzz, "HANGS", 1)
    found = fuzz.run("planted", tmp_path, 5, 0)
    assert wanted in found["problem"]
    assert (tmp_path / "case").read_bytes() not in (b"", b'{"a": 1}')


@pytest.mark.filterwarnings("ignore:.*fork")
def test_inputs_that_reach_new_code_are_changed_further(tmp_path, monkeypatch):
    """Six letters in their places are found one by one, and not all at once by chance."""
    atheris = pytest.importorskip("atheris", reason="atheris has no wheel for this Python")

    @atheris.instrument_func
    def deep(data):
        first = data[0:1] == b"{" and data[1:2] == b"[" and data[2:3] == b","
        if first and data[3:4] == b"\xff" and data[4:5] == b"{" and data[5:6] == b",":
            raise KeyError(data)

    @contextmanager
    def parser(folder):
        yield [b"........"], lambda data: deep(data) is None

    monkeypatch.setitem(fuzz.PARSERS, "planted", parser)
    for guided in (False, True):
        folder = tmp_path / str(guided)
        folder.mkdir()
        found = fuzz.run("planted", folder, 60, 0, 30_000, guided)
        assert ("KeyError" in found["problem"]) == guided, found


def test_mutations_differ_and_repeat():
    def cases():
        generator = random.Random(5)
        good = json.dumps({"a": [1, {"b": "c"}]})
        return [fuzz.mutated(good, generator) for _ in range(200)]

    assert cases() == cases()
    assert len({*cases()}) > 100
