"""Files and folders that several processes may write at once, without torch."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

from slotmoe.jsonfile import Json


def take_lock(path: Path, flags: int, seconds: float) -> int:
    """A handle of ``path``, opened with ``flags``, that alone holds its lock until it is closed.
    Raises ``BlockingIOError`` if another has the lock for so many seconds, and ``OSError``."""
    until = time.monotonic() + seconds
    while True:
        handle = os.open(path, flags | os.O_NOFOLLOW, 0o600)
        try:
            while not _has_locked(handle, until):
                time.sleep(0.01)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed or renamed in between


def _has_locked(handle: int, until: float) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if time.monotonic() > until:
            raise
        return False


def write_note(path: Path, values: Json) -> None:
    """Replace ``path`` by the JSON of ``values``, whole but not durably.  Raises ``OSError``."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    fresh.write_text(json.dumps(values))
    fresh.replace(path)


def read_note(path: Path) -> Json:
    """What ``write_note`` wrote; nothing if it is not there or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
