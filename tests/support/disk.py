"""What tests of writing to a disk share: a folder's bytes, a disk that fills up, runs that are
stopped or killed."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


def tree(folder):
    """Every file below ``folder`` and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digests(folder):
    """Every file below ``folder`` and the SHA-256 of its bytes."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(folder).items()}


class Stop(Exception):
    """What a caller's progress raises."""


def stop_at(share):
    """A progress function that stops the run when so much of it is done."""

    def progress(done, total):
        if done >= share * total:
            raise Stop

    return progress


def killed(*_arguments):
    """In place of a function that a run was killed before."""
    raise Stop


@contextmanager
def small_disk(folder, size):
    """A file system of ``size`` (as tmpfs takes it) in a new folder, and a function that resizes
    it; skips the test if it can't be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield (
            disk,
            lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True),
        )
    finally:
        subprocess.run(["umount", disk], check=True)


def die_at_change(number):
    """Let this process kill itself at its ``number``-th change of the disk."""
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "rename", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    shutil.copyfile = counted(shutil.copyfile)
    Path.write_bytes = counted(Path.write_bytes)


def forked(action, after=None):
    """Exit status of a child that runs ``action``, killed ``after`` so many seconds."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException as problem:
            print(repr(problem), file=sys.stderr)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
