"""Programs and command lines in processes of their own, without an import of torch for each.

``Forked`` is made like ``subprocess.Popen``.  A server, one for each test process, has imported
what commands import.  It forks: the child gets its own arguments, environment, folder, streams and
session, runs the program and ends as an interpreter ends.  What fork changes:

- The server has one thread.  Pools of torch and of OpenBLAS start in the child.
- Libraries have read their environment variables (``OMP_*``, ``HF_*``, ``TRITON_*``) in the server.
  A test that sets these, or that looks at imports, at the interpreter's options or at streams that
  are closed from the start needs a real process.
"""

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND_LINE = "from slotmoe.__main__ import main; main()"
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
_IMPORTED = """torch numpy uvicorn slotmoe.offload.runtime slotmoe.offload.engine.loading
    slotmoe.tools.serve.app slotmoe.tools.chat.terminal slotmoe.tools.profile.report""".split()
_code = [0]  # of this process, if it is a child


class Forked:
    """A child that runs ``program``: the command line, or other Python code.  Streams are pipes,
    ``DEVNULL`` or a file descriptor; a terminal as stdin is the one that controls the child."""

    cpu_seconds = 0.0  # of all that have ended; the system counts them for the server

    def __init__(self, *arguments, program=COMMAND_LINE, stdin=DEVNULL, out=PIPE, env=None):
        self.args, self.returncode = [sys.executable, *map(str, arguments)], None
        environment = dict(os.environ if env is None else env)
        sys.audit("subprocess.Popen", sys.executable, self.args, ROOT, environment)
        ours, theirs = zip(*map(_stream, (stdin, out, out), ("w", "r", "r")), strict=True)
        self.stdin, self.stdout, self.stderr = ours
        self._told, telling = socket.socketpair()
        request = json.dumps([program, self.args[1:], environment])
        self._told.sendall(f"{request}\n".encode())
        socket.send_fds(_server(), [b"\0"], [telling.fileno(), *theirs])
        for handle in theirs:
            os.close(handle)
        telling.close()
        self._lines = self._told.makefile()
        self.pid = int(self._lines.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send_signal(signal.SIGKILL)
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        self.wait()

    def wait(self, timeout=60):
        """The exit code, or minus the signal that ended the child."""
        if self.returncode is None:
            self._told.settimeout(timeout)
            assert self._lines.readline() == "ended\n"
            self._told.shutdown(socket.SHUT_WR)
            code, seconds = self._lines.readline().split()
            self._lines.close()
            self._told.close()
            self.returncode = int(code)
            Forked.cpu_seconds += float(seconds)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
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


@functools.cache
def _server():
    """The socket of this test process's server."""
    ours, theirs = socket.socketpair()
    options = {"pass_fds": [theirs.fileno()], "stdin": DEVNULL, "cwd": ROOT}
    command = [sys.executable, "-m", "tests.support.forkserver", str(theirs.fileno())]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # else numpy starts threads
    server = subprocess.Popen(command, start_new_session=True, env=environment, **options)
    theirs.close()

    @atexit.register
    def end():
        ours.close()
        server.wait()

    return ours


def _serve(control):
    """Fork for each request.  Returns in children only: the program and its arguments."""
    while True:
        _, handles, _, _ = socket.recv_fds(control, 1, 4)
        if not handles:
            os._exit(0)
        if not os.fork():
            control.close()
            return _child(*handles)
        for handle in handles:
            os.close(handle)


def _child(telling, *streams):
    """Make this process look new; another one, between it and the server, tells how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=telling) as told:
        child = os.fork()
        if child:
            for handle in streams:
                os.close(handle)
            told.sendall(f"{child}\n".encode())
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            told.sendall(b"ended\n")
            told.recv(1)  # it keeps its number until somebody has waited for it
            _, status, usage = os.wait4(child, 0)
            code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            told.sendall(f"{code} {seconds}\n".encode())
            os._exit(0)
        program, arguments, environment = json.loads(told.makefile().readline())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    os.setsid()
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    errors = {"errors": "backslashreplace", "buffering": 1}
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False, **errors)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    return program


def _run(program):
    """Run it, and leave at the end of all that exit handlers do: to take apart what the server has
    imported costs a quarter of a second."""
    code = 1
    try:
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        atexit.unregister(_leave)  # the interpreter ends itself by the signal
        raise
    finally:
        _code[0] = code


def _leave():
    with suppress(OSError, ValueError):  # which the interpreter meets again, and tells
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code[0])


if __name__ == "__main__":
    atexit.register(_leave)  # the first to come is the last to run
    from slotmoe.tools.cli import _COMMANDS

    for name in [*_IMPORTED, *(f"slotmoe.tools.{command}" for command in _COMMANDS)]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started threads"
    gc.collect()
    gc.freeze()  # else a child's collector would copy the pages of all that the server holds
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the server's own children
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
