"""The command line where the world is not as usual: streams that are closed, a terminal for ASCII
alone, a user without a home, names that are no text, and faults of our own."""

import json
import os
import pwd
import shutil
import subprocess
import sys

import pytest

from slotmoe.tools.cli import cli, main
from tests.support.params import nth
from tests.support.tiny import write_checkpoint


def slotmoe(*arguments, shell_suffix="", **environment):
    """A command in a process of its own; ``shell_suffix`` are redirections."""
    command = ["sh", "-c", f'exec "$@" {shell_suffix}', "sh", sys.executable, "-m", "slotmoe"]
    for name in ("PYTHONIOENCODING", "PYTHONUTF8"):
        environment.setdefault(name, "")
    environment = {key: value for key, value in (os.environ | environment).items() if value}
    return subprocess.run(
        [*command, *arguments], capture_output=True, env=environment, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    from slotmoe.offload.ingest.quantize import quantize

    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "export")
    return folder / "export"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("closed", nth(2, ["<&- >&- 2>&-", "2>&-", ">&-"]))
def test_closed_streams(closed, export):
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    done = slotmoe("run", str(export), "Hello", "-n", "3", shell_suffix=closed)
    assert done.returncode == 0, done.stderr
    assert (done.stdout == b"") == (" >&-" in f" {closed}")
    assert (done.stderr == b"") == ("2>&-" in closed)
    assert b"Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("processes")
def test_a_prompt_from_a_closed_stdin_is_empty(export):
    done = slotmoe("run", str(export), "-", "-n", "3", shell_suffix="<&-")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("processes")
def test_stdout_for_ascii_alone(tmp_path):
    (tmp_path / "café").mkdir()
    done = slotmoe("plan", str(tmp_path / "café"), PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    shutil.copy("model/geometries/v2-lite.json", tmp_path / "café" / "config.json")
    done = slotmoe("plan", str(tmp_path / "café"), "--ram", "8GiB", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9 fits" in done.stdout


@pytest.mark.usefixtures("processes")
def test_a_name_that_is_no_text(export, tmp_path):
    """An export of that name runs; the safetensors library can't open such a checkpoint."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(export, os.fsdecode(folder))
    for command in (["plan", folder, "--ram", "2GiB"], ["run", folder, "Hello", "-n", "2"]):
        done = slotmoe(*command)
        assert done.returncode == 0, done.stderr
    write_checkpoint(tmp_path / "plain")
    os.rename(tmp_path / "plain", folder + b"2")
    for name, problem in ((b"2", b"rename the folder"), (b"22", b"no such folder")):
        done = slotmoe("run", folder + name, "Hello", SLOTMOE_CACHE=str(tmp_path / "cache"))
        assert (done.returncode, done.stderr.splitlines()[-1].count(problem)) == (2, 1)
        assert b"Traceback" not in done.stderr


def failed(capsys, *arguments):
    """Exit code and stderr of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    return caught.value.code, capsys.readouterr().err


@pytest.mark.usefixtures("processes")
def test_a_user_without_a_home(capsys, monkeypatch):
    def nobody(uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "SLOTMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for arguments in (["list"], ["run", "sample", "x"], ["plan", "v2-lite"]):
        code, err = failed(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "no home folder" in err and "set SLOTMOE_CACHE" in err
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["cache"]["state"] == "bad"
    assert checks["disk"]["state"] == "ok"


def test_a_folder_that_was_removed(capsys, tmp_path, monkeypatch):
    """MKL ended the process with a line of its own."""
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert failed(capsys, "list") == (
        2,
        "slotmoe: the folder that this runs in was removed; cd to another\n",
    )


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (RuntimeError("can't start new\x1b[2J thread"), r"RuntimeError: can't start new\x1b[2J th"),
        (ValueError(""), "internal error (ValueError"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "out of threads; lower --threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory; end"),
        (
            ImportError("libtorch.so: failed to map segment"),
            "failed to map segment): memory is short",
        ),
    ],
)
def test_a_fault_of_ours_is_one_line(problem, shown, capsys, monkeypatch):
    from slotmoe.tools import list as listing

    def fail():
        raise problem

    monkeypatch.setattr(listing, "cache_folder", fail)
    code, err = failed(capsys, "list")
    assert (code, err.count("\n")) == (1, 1)
    assert shown in err
    if "internal" in err:
        assert "test_environment.py, line" in err
        assert "Traceback" in failed(capsys, "--traceback", "list")[1]


def test_slotmoe_alone_says_what_to_do_next(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for line in shown.splitlines():
        if line.startswith("  slotmoe"):
            assert cli.get_command(None, line.split()[1]) is not None
    assert "slotmoe run sample" in shown and len(shown.splitlines()) < 24


def test_yarn_needs_a_logarithm(tmp_path, capsys):
    write_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 1}))
    code, err = failed(capsys, "plan", str(tmp_path / "model"))
    assert (code, err.count("\n")) == (2, 1)
    assert "rope.rope_theta is 1" in err


def test_a_key_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "keys").write_bytes(b"caf\xe9\n")
    code, err = failed(capsys, "serve", "sample", "--api-key-file", str(tmp_path / "keys"))
    assert (code, err.count("\n")) == (2, 1)
    assert "keys: is not UTF-8 text" in err
