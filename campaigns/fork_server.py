"""Children of the model package without a new interpreter for each: a process that has imported
what they import forks, and the fork runs the same program with the same streams and limits.  That
takes a millisecond or two in place of some 60."""

import json
import subprocess
import sys

from slotmoe.model import child

STREAMS = ("stdin", "stdout", "stderr")
SERVER = """
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


def fork_children(folder):
    """From now on ``slotmoe.model.child`` starts its programs by such a process, whose files are in
    ``folder``; it ends with this one."""
    paths = json.dumps([path for path in sys.path if path])
    command = [sys.executable, "-I", "-S", "-c", SERVER, paths]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={})
    streams = [folder / name for name in STREAMS]

    def run(command, input, **_):
        for path in streams:
            path.write_bytes(input if path.name == "stdin" else b"")
        program, arguments = command[4], ["-c", *command[5:]]  # after python -I -S -c
        print(json.dumps([program, arguments, [*map(str, streams)]]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        written = (path.read_bytes() for path in streams[1:])
        return subprocess.CompletedProcess(command, code, *written)

    child.subprocess.run = run
