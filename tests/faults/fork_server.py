"""Children of the model package without a new interpreter for each: a process that has imported
what they import forks, and the fork runs the same program with the same streams and limits.  That
takes a millisecond or two in place of some 60."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

_STREAMS = ("stdin", "stdout", "stderr")
_SERVER = """
import datetime, json, os, resource, signal, sys, traceback
sys.path[:] = json.loads(sys.argv[1])
import jinja2.ext, jinja2.sandbox, tokenizers
for line in sys.stdin:
    program, sys.argv, streams = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate(streams):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        code = 0
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def forked_children(folder: Path) -> Iterator[None]:
    """``slotmoe.model.child`` starts its programs by such a process, whose files are in
    ``folder``."""
    paths = json.dumps([path for path in sys.path if path])
    command = [sys.executable, "-I", "-S", "-c", _SERVER, paths]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={})
    assert server.stdin is not None and server.stdout is not None
    streams = {name: folder / name for name in _STREAMS}

    def run(command: list[str], input: bytes, **_: Any) -> subprocess.CompletedProcess[bytes]:
        for name, path in streams.items():
            path.write_bytes(input if name == "stdin" else b"")
        program, arguments = command[4], ["-c", *command[5:]]  # after python -I -S -c
        print(json.dumps([program, arguments, [*map(str, streams.values())]]), file=server.stdin)
        server.stdin.flush()
        code = int(server.stdout.readline())
        written = (streams[name].read_bytes() for name in _STREAMS[1:])
        return subprocess.CompletedProcess(command, code, *written)

    with server, patch("slotmoe.model.child.subprocess.run", run):
        yield
