"""Each command where the world is not as usual.

Whatever the world is like, a command ends within a minute, with an exit code of the contract, and
what it says of a failure is one line of ours.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

from campaigns.models import talking
from campaigns.runner import Attack
from tests.support.tiny import SMALL

HANGS = 60  # seconds
COMMANDS = {
    "list": "list",
    "rm": "rm nothing",
    "plan": "plan v2-lite --ram 8GiB",
    "doctor": "doctor --json",
    "verify": "verify {export}",
    "run": "run {export} Hello -n 2 --context 64",
    "chat": "chat {export} -n 2 --context 256",
    "quantize": "quantize {source} {work}/made",
}


class World(NamedTuple):
    """``variables`` of the environment (an empty one is absent), redirections of a shell, what a
    child does before the command starts and with which ``prefix``, and where the export lies."""

    variables: dict[str, str] = {}  # noqa: RUF012
    streams: str = ""
    before: Callable[[], object] = lambda: None
    prefix: tuple[str, ...] = ()
    folder: str = "export"


def limit(kind, amount):
    return lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (amount, amount))


def in_a_folder_that_is_gone():
    name = tempfile.mkdtemp()
    os.chdir(name)
    os.rmdir(name)


HOMELESS = {"HOME": "", "SLOTMOE_CACHE": "", "USER": "", "LOGNAME": ""}
UNKNOWN = ("unshare", "--user", "--map-user=54321", "--map-group=54321")  # no entry of passwd
NOWHERE = {"HOME": "/nonexistent", "SLOTMOE_CACHE": ""}
WORLDS = {
    "as usual": World(),
    "no home": World(HOMELESS, prefix=UNKNOWN),
    "a home that is not there": World(NOWHERE, prefix=UNKNOWN),
    "a cache that is a file": World({"SLOTMOE_CACHE": "/dev/null"}),
    "a cache that can't be made": World({"SLOTMOE_CACHE": "/proc/nothing/cache"}),
    "no temporary folder": World({"TMPDIR": "/nonexistent"}),
    "no environment": World({name: "" for name in os.environ if name != "PATH"}),
    "stdin closed": World(streams="<&-"),
    "stdout closed": World(streams=">&-"),
    "stderr closed": World(streams="2>&-"),
    "all streams closed": World(streams="<&- >&- 2>&-"),
    "stdout full": World(streams=">/dev/full"),
    "stderr full": World(streams="2>/dev/full"),
    "ASCII": World({"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
    "a dumb terminal": World({"TERM": "dumb", "NO_COLOR": "1"}),
    "a narrow terminal": World({"COLUMNS": "12", "LINES": "3"}),
    "few descriptors": World(before=limit("NOFILE", 24)),
    "very few descriptors": World(before=limit("NOFILE", 8)),
    "no files of any size": World(before=limit("FSIZE", 0)),
    "no locked memory": World(before=limit("MEMLOCK", 0)),
    "little address space": World(before=limit("AS", 900 << 20)),
    "very little address space": World(before=limit("AS", 200 << 20)),
    "few threads": World(before=limit("NPROC", 1), prefix=UNKNOWN),
    "a folder that is gone": World(before=in_a_folder_that_is_gone),
    "a strange name": World(folder="-x 'a\n\"é$(id)\u202e"),
    "a name that is no text": World(folder="caf\udce9"),
}


def attempt(place, world, command):
    """Exit code, and what is wrong with how it ended."""
    work, export = place / "work", place / world.folder
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if not export.exists():
        shutil.copytree(place / "export", export)
    names = {"source": place / "source", "export": export, "work": work}
    arguments = [part.format(**names) for part in COMMANDS[command].split()]
    shell = ["sh", "-c", f'exec "$@" {world.streams}', "sh", sys.executable, "-m", "slotmoe"]
    given = {**os.environ, "SLOTMOE_CACHE": str(work / "cache"), **world.variables}
    try:
        done = subprocess.run(
            [*world.prefix, *shell, *map(os.fsencode, arguments)],
            input=b"Hi\n",
            capture_output=True,
            env={name: value for name, value in given.items() if value},
            preexec_fn=world.before,
            timeout=HANGS,
        )
    except subprocess.TimeoutExpired:
        return -1, "does not end"
    code, error = done.returncode, done.stderr.decode(errors="replace")
    lines = error.strip().splitlines()
    if code not in (0, 1, 2):
        return code, f"exit code {code}: {lines[-3:]}"
    if "Traceback" in error or "internal error" in error:
        return code, f"{lines[-3:]}"
    if code and lines and not lines[-1].startswith(("slotmoe: ", "Error: ")):
        return code, f"no line of ours: {lines[-3:]}"
    return code, ""


@contextmanager
def prepare(folder, given):
    talking(folder, **SMALL)
    yield folder


def run(place, name, aim):
    codes, wrong = {}, []
    for command in COMMANDS:
        if aim.goes_on(len(codes)):
            codes[command], problem = attempt(place, WORLDS[name], command)
            wrong += [f"{command}: {problem}"] * bool(problem)
    if name == "as usual" and any(code != 2 * (name == "rm") for name, code in codes.items()):
        wrong.append("a command that fails as it usually does not")
    return {**codes, "wrong": wrong}


ATTACK = Attack(run, WORLDS, "commands in each world", len(COMMANDS), prepare=prepare)
