"""Files and folders that several processes may write at once, without torch."""

import errno
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from slotmoe.errors import ConfigError, naming
from slotmoe.jsonfile import Json
from slotmoe.sizes import format_size
from slotmoe.system import move, open_file, take_lock

# Network folders whose locks reach a single machine, by type and options of the mount.
_UNSHARED = re.compile(
    r"fuse\.(sshfs|rclone|s3fs|gcsfuse|blobfuse2) |nfs4? .*\b(nolock|local_lock=(all|flock))\b|"
    r"(cifs|smb3) .*\bnobrl\b|lustre .*\blocalflock\b"
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_locks(folder: Path) -> None:
    """Raise ``ConfigError`` if ``folder`` has no locks, or none that other machines see."""
    if _UNSHARED.match(kind := " ".join(file_system(folder))):
        problem = f"{folder}: other machines do not see the locks of its file system ({kind:.200})"
        raise ConfigError(f"{problem}; take a local folder, or NFS with its locks")
    try:
        os.close(take_lock(folder / "lock", 1.0))
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            reason = f"{folder}: its file system has no locks ({problem.strerror})"
            raise ConfigError(f"{reason}; take another folder") from None


def file_system(folder: Path) -> tuple[str, str]:
    """The type of the one that ``folder`` is on, as in ``ext4``, and the options of its mount."""
    there, parts = folder.resolve(), psutil.disk_partitions(all=True)
    mounts = [part for part in parts if there.is_relative_to(part.mountpoint)]
    mounts.sort(key=lambda part: len(part.mountpoint))  # of two at one place the later is on top
    return (mounts[-1].fstype, mounts[-1].opts) if mounts else ("unknown file system", "")


def check_removed(left: Sequence[OSError], freed: int) -> None:
    """Raise an ``OSError`` that names the first file ``left``, if any, and the bytes ``freed``."""
    if left:
        more = f", nor {len(left) - 1} others" if len(left) > 1 else ""
        said = f"can't be removed ({left[0].strerror}){more}; {format_size(freed)} are free again"
        raise OSError(left[0].errno, said, left[0].filename)


def write_note(path: Path, values: Json) -> None:
    """Replace ``path`` by the JSON of ``values``, whole but not durably.  Raises ``OSError``."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    with naming(path):
        fresh.write_bytes(json.dumps(values).encode())
    move(fresh, path)


def read_note(path: Path) -> Json:
    """What ``write_note`` wrote; nothing if it is not there or damaged."""
    try:
        with open(path, "rb", opener=open_file) as file:
            values = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
