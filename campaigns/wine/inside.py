"""What runs in a Python of either system: it reads lines of JSON, calls the function of that name
for each, and writes a line with what it gave.  It knows slotmoe and nothing of campaigns."""

import contextlib
import hashlib
import io
import json
import os
import sys
import traceback

from slotmoe.offload.runtime import Runtime
from slotmoe.tools.cli import main


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
