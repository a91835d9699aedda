"""What runs in a Python of either system: it reads lines of JSON, calls the function of that name
for each, and writes a line with what it gave.  It knows slotmoe and nothing of campaigns."""

import contextlib
import hashlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

from slotmoe import system
from slotmoe.errors import ConfigError
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools.cli import main

_held = []


def command(words, text=""):
    """Exit code, stdout and stderr of a command line in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    out, err = streams
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode() for stream in streams)


def dying(words, at=0):
    """``command``, which ends this process at its ``at``-th change of the disk; how many there
    are."""
    changes = 0

    def counted(function):
        def call(*given, **options):
            nonlocal changes
            changes += 1
            if changes == at:
                os.kill(os.getpid(), 9)
            return function(*given, **options)

        return call

    for module, name in ((system, "move"), *((os, name) for name in ("fsync", "unlink", "mkdir"))):
        setattr(module, name, counted(getattr(module, name)))
    return command(words), changes


def hold(path, folder=False):
    """Take the lock of ``path`` until this process ends."""
    _held.append(system.take_lock(Path(path), 0, folder=folder))


def number():
    """This process, as its system counts."""
    return os.getpid()


def end(process):
    """End another process; on Windows by TerminateProcess."""
    os.kill(process, 9)


def choose(instructions):
    """Let models that are opened from now on compute with these; whether the machine has them."""
    os.environ[bindings.INSTRUCTIONS] = instructions
    bindings.load.cache_clear()
    try:
        bindings.load()
    except ConfigError:
        return False
    return True


def logits(model, count, **options):
    """The SHA-256 of the logits of ``count`` tokens."""
    with Runtime.open(model, threads=2, **options) as runtime:
        found = runtime.logits([7 * number % 1000 + 1 for number in range(count)])
        return hashlib.sha256(found.float().numpy().tobytes()).hexdigest()


def serve():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    for line in sys.stdin.buffer:
        function, given = json.loads(line)
        try:
            answer = {"is": globals()[function](**given)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
