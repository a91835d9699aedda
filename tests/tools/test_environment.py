"""The command line where the world is not as usual: streams that are closed or leave, a terminal
for ASCII alone, signals, a user without a home, names that are no text, faults of our own."""

import errno
import io
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time

import pytest

from slotmoe import system
from slotmoe.model.network import Network
from slotmoe.tools import cli, exports, options
from tests.support.forkserver import COMMAND_LINE, PIPE, ROOT, Forked
from tests.support.tiny import SMALL, write_checkpoint

PROMPT = "It is a truth universally acknowledged, that"
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
def test_streams_and_names_that_are_no_text(small_export, tmp_path):
    """An export of such a name runs; the safetensors library can't open such a checkpoint."""
    (tmp_path / "café").mkdir()
    shutil.copy(ROOT / "model/geometries/v2-lite.json", tmp_path / "café" / "config.json")
    program = f"import sys; sys.stdout.reconfigure(encoding='ascii')\n{COMMAND_LINE}"
    child = Forked("plan", tmp_path / "café", "--ram", "8GiB", program=program)
    assert b"caf\\xe9 fits" in child.communicate()[0] and child.returncode == 0
    child = Forked("run", small_export, "-", stdin=PIPE)
    told = b"slotmoe: stdin: the prompt is not valid UTF-8 text\n"
    assert child.communicate(b"caf\xe9") == (b"", told) and child.returncode == 2
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
def test_a_reader_that_leaves(sample_export, monkeypatch):
    """On Windows a pipe says so in words that click does not know."""
    options = "-n 400 --temperature 1 --seed 5".split()
    with Forked("run", sample_export, PROMPT, *options) as child:
        assert child.stdout.read(1)
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 1)
    monkeypatch.setattr(system, "NO_READER", (errno.EINVAL, "Invalid argument"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit, match="1"):
        cli._ending(OSError(errno.EINVAL, "Invalid argument"), False)
    for problem in (OSError(errno.EINVAL, "Else"), OSError(errno.EINVAL, "Invalid argument", "a")):
        assert cli._ending(problem, False)[1] == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_interrupted_generation(options, slotmoe, small_export, monkeypatch):
    """Ctrl-C after three tokens, in the middle of the fourth."""
    original, calls = Network.forward, []

    def forward(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            time.sleep(0.5)  # the main thread takes what there is, then hears of the signal
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Network, "forward", forward)
    code, out, err = slotmoe("run", small_export, "Hello", *options)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert ("3 tokens · " in err) == (out != "") == (not options)


@pytest.mark.usefixtures("processes")
def test_interrupted_command_exits_130(sample_export, small_export):
    """While it decodes, and in a process of its own while torch is on its way."""
    options = "-n 800 --temperature 1 --seed 5 --threads 1".split()
    with Forked("run", sample_export, "-", *options, stdin=PIPE) as child:
        with child.stdin:
            child.stdin.write(PROMPT.encode())
        assert len(child.stdout.read(200)) == 200
        child.send_signal(signal.SIGINT)
        err = child.communicate()[1].decode()
    assert child.returncode == 130, err
    assert "interrupted" in err and "tokens/s · first token" in err and "Traceback" not in err
    command = [sys.executable, "-X", "importtime", "-m", "slotmoe", "run", str(small_export), "x"]
    with subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as child:
        for line in child.stderr:
            if "torch._utils" in line:
                break
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (child.returncode, out, said) == (130, "", ["", "slotmoe: interrupted"])


@pytest.mark.usefixtures("processes")
def test_a_user_without_a_home_or_a_folder(slotmoe, monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError("getpwuid(): uid not found")

    with monkeypatch.context() as patch:
        patch.setattr(pwd, "getpwuid", nobody)
        for name in ("HOME", "SLOTMOE_CACHE"):
            patch.delenv(name, raising=False)
        for arguments in (["list"], ["run", "sample", "x"], ["plan", "v2-lite"]):
            code, _, err = slotmoe(*arguments)
            assert (code, err.count("\n")) == (2, 1)
            assert "no home folder" in err and "set SLOTMOE_CACHE" in err
        checks = json.loads(slotmoe("doctor", "--json")[1])["checks"]
        states = {check["name"]: check["state"] for check in checks}
        assert (states["cache"], states["disk"]) == ("bad", "ok")
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()  # MKL ended the process with a line of its own
    told = "slotmoe: the folder that this runs in was removed; cd to another\n"
    assert slotmoe("list") == (2, "", told)


FAULTS = [
    (RuntimeError("can't start new\x1b[2J thread"), r"RuntimeError: can't start new\x1b[2J th"),
    (MemoryError(), "out of memory"),
    (RuntimeError("can't start new thread"), "out of threads; lower --threads"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory; end"),
    (ImportError("libtorch.so: failed to map segment"), "map segment): memory is short"),
]


def test_a_fault_of_ours_is_one_line(slotmoe, monkeypatch):
    for problem, shown in FAULTS:

        def fail(problem=problem):
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
