"""Programs and command lines in processes of their own, without an import of torch for each.

``Forked`` is made like ``subprocess.Popen``.  multiprocessing's fork server, one for each test
process, has imported what commands import.  It forks: the child gets its own arguments,
environment, folder, streams and session, runs the program and ends as an interpreter ends.  What
fork changes:

- The server has one thread.  Pools of torch and of OpenBLAS start in the child.
- Libraries have read their environment variables (``OMP_*``, ``HF_*``, ``TRITON_*``) in the server.
  A test that sets these, or that looks at imports, at the interpreter's options or at streams that
  are closed from the start needs a real process.
"""

import atexit
import fcntl
import multiprocessing
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from unittest.mock import patch

from slotmoe.tools.cli import _COMMANDS, _MODULES

ROOT = Path(__file__).parents[2]
COMMAND_LINE = "from slotmoe.__main__ import main; main()"
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("torch", "numpy", "uvicorn", "tests.support.forkserver"),
        *("slotmoe.offload.runtime", "slotmoe.offload.engine.loading", "slotmoe.tools.serve.app"),
        *("slotmoe.tools.chat.terminal", "slotmoe.tools.profile.report"),
        *(f"slotmoe.tools.{_MODULES.get(command, command)}" for command in _COMMANDS),
    ]
)


class Forked:
    """A child that runs ``program``: the command line, or other Python code.  Streams are pipes,
    ``DEVNULL`` or a file descriptor; a terminal as stdin is the one that controls the child."""

    def __init__(self, *arguments, program=COMMAND_LINE, stdin=DEVNULL, out=PIPE, env=None):
        words, environment = [*map(str, arguments)], dict(os.environ if env is None else env)
        ours, theirs = zip(*map(_stream, (stdin, out, out), ("w", "r", "r")), strict=True)
        self.stdin, self.stdout, self.stderr = ours
        # Else numpy starts threads in the server.
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):
            given = _Given(program, words, environment, theirs)
            self._process = _SERVER.Process(target=_run, args=(given,))
            self._process.start()
        for handle in theirs:
            os.close(handle)
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send_signal(signal.SIGKILL)
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        self.wait()

    @property
    def returncode(self):
        return self._process.exitcode

    def wait(self, timeout=60):
        """The exit code, or minus the signal that ended the child."""
        self._process.join(timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def communicate(self, data=b""):
        """Write ``data``, read both outputs to their ends, and wait."""
        if self.stdin and not self.stdin.closed:
            with self.stdin:
                self.stdin.write(data)
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            out, err = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        self.wait()
        return out, err


class OnTerminal(Forked):
    """A child on a terminal of 30 lines of 100 characters."""

    def __init__(self, *arguments, **environment):
        self.handle, theirs = pty.openpty()
        self._unread = b""
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        env = os.environ | {"TERM": "xterm", "COLUMNS": "100"} | environment
        super().__init__(*arguments, stdin=theirs, out=theirs, env=env)
        os.close(theirs)

    def __exit__(self, *_):
        super().__exit__()
        os.close(self.handle)

    def send(self, text):
        os.write(self.handle, text.encode())

    def until(self, text, seconds=60):
        """Wait until ``text`` is shown and return what was shown before it; what is after it is
        left for the next time."""
        end = time.monotonic() + seconds
        while text.encode() not in self._unread:
            ready, _, _ = select.select([self.handle], [], [], max(end - time.monotonic(), 0))
            assert ready, (text, self._unread)
            new = os.read(self.handle, 1 << 16)
            if b"\x1b[6n" in new:  # where is the cursor?
                self.send("\x1b[1;1R")
            self._unread += new
        before, _, self._unread = self._unread.partition(text.encode())
        return before

    def rest(self):
        """All that is shown until the child ends."""
        with suppress(OSError):  # as Linux ends it
            while block := os.read(self.handle, 1 << 16):
                self._unread += block
        return self._unread.decode()


def _stream(wanted, mode):
    """Our end of a child's stream, if it is a pipe, and a descriptor of the child's end."""
    if wanted == DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    if wanted != PIPE:
        return None, os.dup(wanted)
    read, write = os.pipe()
    return (open(read, "rb"), write) if mode == "r" else (open(write, "wb", 0), read)


class _Given:
    """What a child gets."""

    def __init__(self, program, arguments, environment, streams):
        self.program, self.arguments, self.environment = program, arguments, environment
        self.streams = streams

    def __getstate__(self):
        return {**vars(self), "streams": [DupFd(handle) for handle in self.streams]}


def _run(given):
    """Make this process look new, run the program, and end as an interpreter ends, but for taking
    apart all that the server has imported."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    os.setsid()
    for number, stream in enumerate(given.streams):
        os.dup2(handle := stream.detach(), number)
        os.close(handle)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(ROOT)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    errors = {"errors": "backslashreplace", "buffering": 1}
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False, **errors)
    os.environ.clear()
    os.environ.update(given.environment)
    sys.argv[1:] = given.arguments
    code = 1
    try:
        exec(given.program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = 120
    os._exit(code)
