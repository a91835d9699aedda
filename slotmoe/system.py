"""What Linux and macOS do each in its own way."""

import fcntl
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds of all cores in each so many


def cores() -> int:
    """Cores that this process can keep busy: the machine's physical ones, unless it may run on
    fewer or a CPU cgroup gives it the time of fewer."""
    count: int = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if sys.platform == "linux":
        count = min(count, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = map(int, _CPU_LIMIT.read_text().split())
        count = min(count, max(1, round(quota / period)))
    return count


def bypass_page_cache(handle: int, alignment: int) -> bool:
    """Whether reads of the open file go past the page cache from now on, which begin and end at
    multiples of ``alignment`` in the file and in memory.  False leaves the file as it was."""
    try:
        _set_direct(handle, True)
        # Both at an odd multiple: file systems may want whole pages, of 16 or 64 KiB on some ARM.
        memory = memoryview(mmap.mmap(-1, 2 * alignment))[alignment:]
        os.preadv(handle, [memory], alignment)
        return True
    except OSError:
        use_page_cache(handle)
        return False


def use_page_cache(handle: int) -> None:
    """Undo ``bypass_page_cache``."""
    with suppress(OSError):
        _set_direct(handle, False)


def _set_direct(handle: int, on: bool) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(handle, fcntl.F_NOCACHE, int(on))
        return
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
