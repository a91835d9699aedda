"""What tests of writing to a disk share: a folder's bytes, runs that are stopped or killed."""

import hashlib
import os
import shutil
import signal
import stat
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path


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


class Stop(BaseException):
    """What ends a run from a caller's progress, as Ctrl-C does: an error there ends nothing."""


def stop_at(share):
    """A progress function that stops the run when so much of it is done."""

    def progress(done, total):
        if done >= share * total:
            raise Stop

    return progress


def memory():
    """A folder of a file system in RAM, where there is one: processes that die need no real disk,
    and on one each file that is opened anew costs milliseconds."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def die_at_change(number, cut=None):
    """Let this process kill itself at its ``number``-th change of the disk.  With a folder ``cut``
    that is a power cut: what is there now, and what ``fsync`` is called for, is kept under its new
    names; other files are empty."""
    calls, synced = 0, dict[int, bytes]()
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "unlink", "mkdir")}

    def keep(path):
        synced[os.stat(path).st_ino] = Path(path).read_bytes()

    def change(name, *arguments, **options):
        with suppress(OSError):  # an inode that is free may be another file's next
            if name in ("rename", "unlink"):
                synced.pop(os.stat(arguments[-1], dir_fd=options.get("dir_fd")).st_ino, None)
        originals[name](*arguments, **options)
        if cut is not None and name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
            keep(f"/proc/self/fd/{arguments[0]}")

    def die():
        for path in files():
            with open(path, "r+b") as file:
                file.write(synced.get(path.stat().st_ino, b""))
                file.truncate()
        os.kill(os.getpid(), signal.SIGKILL)

    def files():
        return [path for path in (cut.rglob("*") if cut is not None else ()) if path.is_file()]

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                die()
            return function(*arguments, **options)

        return call

    for path in files():
        keep(path)
    for name in originals:
        setattr(os, name, counted(partial(change, name)))
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


def per_token(nbytes):
    """The size of blocks that hold so many bytes of each token."""
    return lambda block: nbytes * len(block.tokens)
