"""The folder that an export is made in, and the moment when it gets its name.

Work happens in ``DST.partial``, which one process owns at a time; the last act is to rename it to
``DST``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slotmoe.errors import ExportError
from slotmoe.offload.plan.memory import format_size
from slotmoe.quant.export.layout import COPIED, MANIFEST, RESIDENT, is_predictor
from slotmoe.quant.export.writer import sync_folder


def partial_folder(destination: Path) -> Path:
    """The folder beside ``destination`` in which it is made.  Raises ``ExportError`` if the
    destination has no name."""
    if destination.name in ("", ".."):
        raise ExportError(
            f"{destination}: is not the name of a new folder; choose another destination"
        )
    return destination.with_name(destination.name + ".partial")


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``ExportError`` if making ``destination`` an export would lose anything but, with
    ``overwrite``, an export."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ExportError(f"{destination}: exists and is not a folder; choose another destination")
    if destination.is_dir() and any(destination.iterdir()):
        if not (destination / MANIFEST).is_file():
            raise ExportError(
                f"{destination}: exists and is not an export, so it is never overwritten; choose another destination"
            )
        if not overwrite:
            raise ExportError(
                f"{destination}: exists; pass --overwrite to replace it, or choose another destination"
            )
    for folder in (destination, partial_folder(destination), _replaced_folder(destination)):
        check_ours(folder)


def check_ours(folder: Path) -> None:
    """Raise ``ExportError`` if ``folder``, which is about to be emptied, holds what no export
    has."""
    ours = {*COPIED, MANIFEST, RESIDENT, "experts", "state.json"}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = [
        name
        for name in names
        if (plain := name.removesuffix(".tmp")) not in ours and not is_predictor(plain)
    ]
    if foreign:
        raise ExportError(
            f"{folder}: holds {foreign[0]}, which no export has, so it is never emptied; move it away"
        )


@contextmanager
def locked(partial: Path, wait_for_lock: bool) -> Iterator[None]:
    """Own the folder ``partial`` (made if absent, removed if left empty); a second process waits or
    is refused."""
    while True:
        try:
            partial.mkdir(exist_ok=True)
        except OSError as problem:
            raise ExportError(
                f"{partial}: can't be made ({problem.strerror}); choose another destination"
            ) from None
        try:
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise ExportError(
                f"{partial}: is no folder of ours ({problem.strerror}); choose another destination"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait_for_lock else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise ExportError(
                f"{partial}: another process is writing it; wait for it to finish"
            ) from None
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(partial))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)  # the other process finished and renamed it meanwhile
    try:
        yield
    finally:
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
        os.close(handle)


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Raise ``ExportError`` instead of an ``OSError`` that says that the disk of ``folder`` is
    full."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"{folder}: the disk is full; make room and run the same command to resume"
        ) from None


def check_space(partial: Path, needed: int) -> None:
    """Raise ``ExportError`` unless the disk of ``partial`` has ``needed`` free bytes."""
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ExportError(
            f"{partial.parent}: needs {format_size(needed)} of free disk, has {format_size(free)}; make room or choose another destination"
        )


def _replaced_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".replaced")


def publish(partial: Path, destination: Path) -> None:
    """Give the finished folder its name, replacing an older export."""
    replaced = _replaced_folder(destination)
    shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed here
    if destination.is_dir() and any(destination.iterdir()):
        os.rename(destination, replaced)
    os.rename(partial, destination)
    sync_folder(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)
