"""Kinds of runtimes that are disturbed, what is computed on them, what must hold afterwards; and a
command that gets a signal in each of its functions."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from slotmoe.offload.experts import disk
from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, decode, whole
from tests.support.twin import Twin, open_on

ROOT = Path(__file__).parents[2]
PASSES = IDS[:12], [7, 8]
SHORT = IDS[:4], [7]  # plain torch, as the twin of a GPU has it, is slow


def compute(runtime):
    """Prefill and decode: all logits."""
    runtime.engine.empty()
    return decode(runtime, *(PASSES if runtime.model.device.tier == "ram" else SHORT))


def on_threads(export, monkeypatch):
    """Every record is read by the threads, in several pieces."""
    monkeypatch.setattr(disk, "HELP_BYTES", 0)
    monkeypatch.setattr(disk, "PIECE_BYTES", 8192)
    return Runtime.open(export, context=256, slots=22)


def on_gpu(export, mode):
    return open_on(export, Twin(1), 40, misses=mode, slots=40, kernels="torch")


KINDS = {
    "helping": lambda export, monkeypatch: Runtime.open(export, context=256, slots=22),
    "threads": on_threads,
    "gpu": lambda export, monkeypatch: on_gpu(export, "fetch"),
    "hybrid": lambda export, monkeypatch: on_gpu(export, "hybrid"),
}


def check(runtime, want):
    """What was cancelled has ended, the next pass is right, and no slot is lost."""
    runtime.engine.call(lambda: whole(runtime))
    assert torch.equal(compute(runtime), want)
    runtime.engine.call(lambda: whole(runtime))


# The command line forks where it calls a function for the first time, each ``every``-th: the child
# gets a signal, and must end by it.  The last line says how many did, and which did not.
STRUCK = """
import atexit, json, os, signal, sys
number, every = int(sys.argv.pop(1)), int(sys.argv.pop(1))
line = b"\\nslotmoe: interrupted" if number == signal.SIGINT else b""
seen, struck, wrong, parent = set(), 0, [], os.getpid()

def can_fork():
    "concurrent.futures takes a lock before a fork, which this thread may hold."
    lock = getattr(sys.modules.get("concurrent.futures.thread"), "_global_shutdown_lock", None)
    return lock is None or not lock.locked()

def strike(code):
    global struck
    read, write = os.pipe()
    child = os.fork()
    if not child:
        sys.settrace(None)
        signal.alarm(60)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.kill(os.getpid(), number)
        return  # and goes on, if the signal is lost
    os.close(write)
    with open(read, "rb") as stream:
        said = stream.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if b"before the process forked" in said:
        return  # it had something to finish, and asked an engine that is the parent's
    struck += 1
    if ended != 128 + number or line not in said or b"Traceback" in said:
        wrong.append([code.co_filename, code.co_name, ended, said.decode()[-400:]])

def trace(frame, event, argument):
    if frame.f_code not in seen and callable(signal.getsignal(signal.SIGTERM)):
        seen.add(frame.f_code)
        if len(seen) % every == 0 and can_fork():
            strike(frame.f_code)

@atexit.register
def tell():
    if os.getpid() == parent:
        sys.settrace(None)
        print(json.dumps([struck, wrong]), file=sys.stderr)

from slotmoe.__main__ import main
sys.settrace(trace)
main()
"""


def struck(number, every, *words):
    """How many signals a command got that reads a message from stdin, and what was wrong."""
    command = [sys.executable, "-c", STRUCK, str(int(number)), str(every), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, input="Hello\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])
