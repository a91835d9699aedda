"""The command line where the world is not as usual: streams that are closed, a terminal for ASCII
alone, a user without a home, names that are no text, and faults of our own."""

import json
import os
import pwd
import shutil
import sys

import pytest

from slotmoe.tools import exports, options
from tests.support.forkserver import COMMAND_LINE, ROOT, Forked
from tests.support.tiny import SMALL, write_checkpoint

CLOSING = """
import os, sys
for number in {}:
    os.close(number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)
"""


@pytest.mark.usefixtures("processes")
def test_closed_streams(small_export):
    """What is opened next gets their numbers, and nothing that is said."""
    for closed in ((0,), (1,), (2,), (0, 1, 2)):
        program = CLOSING.format(closed) + COMMAND_LINE
        prompt = "-" if 0 in closed else "Hello"  # which is then empty
        child = Forked("run", small_export, prompt, "-n", 3, program=program)
        out, err = child.communicate()
        assert child.returncode == 0, err
        assert (out == b"", err == b"") == (1 in closed, 2 in closed)


@pytest.mark.usefixtures("processes")
def test_stdout_for_ascii_alone(tmp_path):
    folder = tmp_path / "café"
    folder.mkdir()
    shutil.copy(ROOT / "model/geometries/v2-lite.json", folder / "config.json")
    program = f"import sys; sys.stdout.reconfigure(encoding='ascii')\n{COMMAND_LINE}"
    child = Forked("plan", folder, "--ram", "8GiB", program=program)
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert b"caf\\xe9 fits" in out


@pytest.mark.usefixtures("processes")
def test_a_name_that_is_no_text(small_export, tmp_path):
    """An export of that name runs; the safetensors library can't open such a checkpoint."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(small_export, folder)
    child = Forked("run", folder, "Hello", "-n", 2)
    err = child.communicate()[1]
    assert child.returncode == 0, err
    write_checkpoint(tmp_path / "plain", **SMALL)
    os.rename(tmp_path / "plain", f"{folder}2")
    for name, problem in (("2", b"rename the folder"), ("22", b"no such folder")):
        child = Forked("run", folder + name, "Hello")
        err = child.communicate()[1]
        assert (child.returncode, err.splitlines()[-1].count(problem)) == (2, 1)


@pytest.mark.usefixtures("processes")
def test_a_user_without_a_home(slotmoe, monkeypatch):
    def nobody(uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "SLOTMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for arguments in (["list"], ["run", "sample", "x"], ["plan", "v2-lite"]):
        code, _, err = slotmoe(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "no home folder" in err and "set SLOTMOE_CACHE" in err
    checks = json.loads(slotmoe("doctor", "--json")[1])["checks"]
    states = {check["name"]: check["state"] for check in checks}
    assert (states["cache"], states["disk"]) == ("bad", "ok")


def test_a_folder_that_was_removed(slotmoe, tmp_path, monkeypatch):
    """MKL ended the process with a line of its own."""
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    told = "slotmoe: the folder that this runs in was removed; cd to another\n"
    assert slotmoe("list") == (2, "", told)


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (RuntimeError("can't start new\x1b[2J thread"), r"RuntimeError: can't start new\x1b[2J th"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "out of threads; lower --threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory; end"),
        (ImportError("libtorch.so: failed to map segment"), "map segment): memory is short"),
    ],
)
def test_a_fault_of_ours_is_one_line(problem, shown, slotmoe, monkeypatch):
    def fail():
        raise problem

    monkeypatch.setattr(exports, "cache_folder", fail)
    code, _, err = slotmoe("list")
    assert (code, err.count("\n")) == (1, 1)
    assert shown in err
    if "internal" in err:
        assert "test_environment.py, line" in err
        assert "Traceback" in slotmoe("--traceback", "list")[2]


def test_what_a_file_may_not_hold_is_one_line(tmp_path, slotmoe):
    """YaRN needs a logarithm; keys are text."""
    config = write_checkpoint(tmp_path / "model", **SMALL)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rope_theta": 1}))
    (tmp_path / "keys").write_bytes(b"caf\xe9\n")
    serve = ["serve", "sample", "--api-key-file", tmp_path / "keys"]
    told = "rope.rope_theta is 1", "keys: is not UTF-8 text"
    for arguments, problem in zip((["plan", tmp_path / "model"], serve), told, strict=True):
        code, _, err = slotmoe(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert problem in err


def test_a_missing_extra_is_one_line_and_pipes_need_none(monkeypatch, slotmoe):
    find_spec, missing = options.find_spec, ["fastapi", "prompt_toolkit"]
    monkeypatch.setattr(options, "find_spec", lambda n: None if n in missing else find_spec(n))
    monkeypatch.setattr("slotmoe.tools.chat.open_runtime", lambda *_: 1 / 0)
    for command, library, is_terminal in (
        ("serve", "fastapi", True),
        ("chat", "prompt_toolkit", True),
        ("chat", "ZeroDivisionError", False),
    ):
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda tty=is_terminal: tty, raising=False)
        code, _, err = slotmoe(command, "sample")
        assert (code, err.count("\n")) == (2 if is_terminal else 1, 1)
        assert library in err and (f"pip install 'slotmoe[{command}]'" in err) == is_terminal
