"""Every system call of a command fails in turn.

A process that has imported everything forks a child for each attempt.  The shim of shim.c, which is
preloaded, lets the child's n-th call on a file of its work fail, or all from the n-th on.  The exit
code must be one of the contract, a failure is one line that names the file, no wrong byte is left
under a final name, and the same command then makes what an undisturbed one makes.
"""

import ctypes
import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from campaigns.runner import Attack
from tests.support.disk import digests, forked

KINDS = {
    **{"bad-disk": 1, "full-disk": 2, "interrupted": 3, "short": 4, "killed": 5},
    "unsynced": 6,  # a bad disk that only fsync reports
    **{"no-locks": 7, "quota": 8, "too-big": 9},
}
LASTING = ("bad-disk", "full-disk", "short", "quota")  # the others happen once
HARMLESS = ("interrupted", "short")


class Command(NamedTuple):
    """A command line and its ``stdin``.  ``made`` names what it leaves in its work that has the
    same bytes each time; ``finished`` must be removed before the same command runs again."""

    line: str
    stdin: str = ""
    made: tuple[str, ...] = ()
    finished: str = ""


COMMANDS = {
    "quantize": Command("quantize {source} {work}/made", made=("made/",)),
    "verify": Command("verify {export}"),
    "run": Command("run {export} Hello -n 3 --context 64", made=("stdout",)),
    "trace": Command("run {export} Hello -n 3 --context 64 --trace {work}/trace", made=("stdout",)),
    "chat": Command(
        "chat {export} -n 3 --temperature 0 --context 256 --session talk --session-dir {work}/kept",
        "Hi\n",
        made=("stdout",),
        finished="kept/names/talk.json",
    ),
    "session": Command(
        "run {export} Hello -n 30 --context 64 --session plans --session-dir {work}/kept",
        made=("stdout",),
        finished="kept/names/plans.json",
    ),
    "profile": Command("profile {export} Hello -n 3 --context 64 -o {work}/report"),
}


class Child:
    """A command in forked children, with ``disk``/work as the place of what it makes."""

    def __init__(self, disk: Path, command: Command):
        self.command, self.work, self.side = command, disk / "work", disk.parent
        self.names = {name: disk / name for name in ("work", "source", "export")}
        for _ in "ab":  # what is imported late is imported here, and not in every child
            assert self.attempt() == 0, self.error
            for module in self.seen["modules"]:
                with suppress(ImportError):  # made up by others
                    importlib.import_module(module)
        self.wanted = self.made()
        assert self.wanted or not command.made

    def made(self):
        whole = {name: sums for name, sums in digests(self.work).items() if name[-4:] != ".tmp"}
        return {name: sums for name, sums in whole.items() if name.startswith(self.command.made)}

    def attempt(self, *fault, anew=True):
        """Run it; its exit code.  ``error`` is what it printed on stderr, ``seen`` how many calls
        each kind of fault could have met, and what was imported."""
        if anew:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
        code = os.waitstatus_to_exitcode(forked(partial(self._run, fault or (0, 0, 0))))
        self.error = (self.side / "stderr").read_text(errors="replace").strip()
        if not fault:
            self.seen = json.loads((self.side / "seen").read_text())
        return code

    def _run(self, fault):
        from slotmoe.tools.cli import main

        for number, path in ((2, self.side / "stderr"), (1, self.work / "stdout")):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        stdin = self.command.stdin.format(**self.names).encode()
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        shim = ctypes.CDLL(None)
        shim.faults_arm(os.fsencode(f"{self.work.parent}/"), *fault)
        code = 0
        try:
            main([part.format(**self.names) for part in self.command.line.split()])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        calls = {kind: shim.faults_calls(number) for kind, number in KINDS.items()}
        shim.faults_arm(b"", 0, 0, 0)
        (self.side / "seen").write_text(json.dumps({"calls": calls, "modules": [*sys.modules]}))
        sys.stderr.flush()
        os._exit(code)

    def judge(self, kind, code):
        """What is wrong with the outcome, or nothing."""
        found, said, out = self.made(), self.error.splitlines()[-1:], self.work / "stdout"
        both = self.error + (out.read_text(errors="replace") if out.exists() else "")
        if kind == "killed" and code == -9:
            pass  # a few calls come or don't by the timing of threads, so it may be missed
        elif code not in ((0,) if kind in HARMLESS else (0, 1, 2)):
            return f"exit code {code}: {said}"
        elif "Traceback" in self.error or "internal error" in self.error:
            return f"{said}"
        elif code and not (said and said[0].startswith("slotmoe: ")):
            return f"no line of ours: {said}"
        elif code and not (f"{self.work.parent}/" in both or "stdin or stdout" in both):
            return f"names no file: {said}"
        if code == 0 and found != self.wanted:
            return "wrong bytes, and exit code 0"
        if kind == "unsynced" and os.strerror(errno.EIO) not in self.error:
            return f"not durable, and not said: {said}"
        for path in set(found) - {"stdout"}:
            if found[path] != self.wanted.get(path):
                return f"wrong bytes in {path}"
        if self.command.made and code:
            if self.command.finished:
                (self.work / self.command.finished).unlink(missing_ok=True)
            if self.attempt(anew=False) or self.made() != self.wanted:
                return f"does not resume: {self.error.splitlines()[-1:]}"
        return ""


@contextmanager
def prepare(folder, given):
    if not hasattr(ctypes.CDLL(None), "faults_arm"):  # the same again, with the shim preloaded
        shim, source = folder / "shim.so", Path(__file__).with_name("shim.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *sys.orig_argv[1:]], env=environment)
        raise SystemExit(done.returncode)
    from campaigns.models import talking

    disk = folder / "disk"
    os.environ["SLOTMOE_CACHE"] = str(disk / "cache")
    assert forked(partial(talking, disk, shards=2)) == 0
    yield disk


def run(disk, name, aim):
    """Each kind of fault at ``--count`` points of the calls that it can meet, or at all."""
    child = Child(disk, COMMANDS[name])
    attempts = [
        (kind, at, lasts)
        for kind, calls in child.seen["calls"].items()
        for lasts in (False, True)[: 1 + (kind in LASTING)]
        for at in sorted(aim.chance.sample(range(1, calls + 1), min(aim.given.count, calls)))
        if kind in aim.given.kinds
    ]
    aim.count, done, wrong = len(attempts), 0, []
    while aim.goes_on(done):
        kind, at, lasts = attempts[done]
        problem = child.judge(kind, child.attempt(KINDS[kind], at, lasts))
        wrong += [f"{kind} {at}{' from then on' * lasts}: {problem}"] * bool(problem)
        done += 1
    return {"points": done, "of": len(attempts), "wrong": wrong}


OPTIONS = {"kinds": {"nargs": "+", "choices": KINDS, "default": [*KINDS], "help": "of faults"}}
ATTACK = Attack(run, COMMANDS, "points of each fault", 1_000_000, prepare=prepare, options=OPTIONS)
