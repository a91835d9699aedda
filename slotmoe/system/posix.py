"""Linux and macOS."""

import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from threading import Timer
from typing import Any, TypeVar

import psutil

assert sys.platform != "win32"

CPUINFO = Path("/proc/cpuinfo")
TOO_LONG, NO_READER = -signal.SIGPROF, None  # see ``windows``
NO_LINK = os.O_NOFOLLOW  # a flag that opens a file as it is, and through no link
# Which of psutil's figures a budget is for, and bytes of ``private_pages`` that may be left over.
MEMORY, ROOM = "rss", 64 << 20
CACHES, CUDA = "~/.cache", "libcuda.so.1"  # where programs keep things; the GPU's driver

T = TypeVar("T")

# Files


def open_file(path: Path | str, flags: int) -> int:
    """A handle of a file that others may replace or remove meanwhile."""
    return os.open(path, flags)


def patiently(act: Callable[..., T], *arguments: Any) -> T:
    """What ``act`` returns, which removes or moves a file that others may have open."""
    return act(*arguments)


def read_at(handle: int, memory: memoryview, offset: int) -> int:
    """Bytes that were read from ``offset`` on into ``memory``, from any thread.  Raises
    ``OSError``."""
    return os.preadv(handle, [memory], offset)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` from ``offset`` on, from any thread.  Raises ``OSError``."""
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, which another file or an empty folder loses."""
    os.rename(source, target)


def sync_folder(folder: Path) -> None:
    """Make moves inside ``folder`` durable.  Raises ``OSError``."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path, folder: bool) -> int:
    """A handle that has the lock of ``path`` until it is closed: of a file, made if absent, or of a
    ``folder``, which may be moved meanwhile.  Raises ``BlockingIOError`` where another has it, and
    ``OSError``."""
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT
    while True:
        handle = os.open(path, flags | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed or moved in between


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
    """Undo ``bypass_page_cache``; reads of several threads do not wait for each other."""
    with suppress(OSError):
        _set_direct(handle, False)


def _set_direct(handle: int, on: bool) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(handle, fcntl.F_NOCACHE, int(on))
        return
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def keep_sparse(handle: int) -> None:
    """Let parts of a file that are never written need no room, if the file system has that."""


def bytes_on_disk(path: Path) -> int:
    """Bytes of a file that have room on the disk by now.  Raises ``OSError``."""
    return 512 * path.lstat().st_blocks


# Memory and processes


def private_pages(count: int, forks: bool) -> mmap.mmap:
    """``count`` bytes of zeros, whose pages cost nothing until written, in large pages where the
    system has them.  Without ``forks`` a child process has no such memory."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would get small pages
    region = mmap.mmap(-1, count, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE") and count >= 4 << 20:
        region.madvise(mmap.MADV_HUGEPAGE)
    if not forks and hasattr(mmap, "MADV_DONTFORK"):
        region.madvise(mmap.MADV_DONTFORK)
    return region


def hold(address: int, size: int) -> None:
    """Keep memory in RAM, where systems take it from whoever rests and can be asked not to."""


def step_back() -> None:
    """Let this thread wait for others."""
    # Elsewhere than on Linux priorities are of processes, one of which may have this id.
    with suppress(OSError):
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def available_memory() -> int:
    """Bytes that the system can give."""
    return int(psutil.virtual_memory().available)


def peak_rss() -> int:
    """The most that ``MEMORY`` of this process was so far, in bytes."""
    try:  # ru_maxrss would count the parent's memory at the time of fork too
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Apple counts bytes


def processor_name() -> tuple[str, list[str]]:
    """The processor's name, if known, and where Linux shows them its flags."""
    facts = {"model name": ""}
    with suppress(OSError):
        lines = CPUINFO.read_text(errors="replace").splitlines()
        pairs = (line.partition(":") for line in reversed(lines))
        facts |= {key.strip(): value.strip() for key, _, value in pairs}
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError, subprocess.SubprocessError):
            facts["model name"] = subprocess.check_output(command, text=True, timeout=5).strip()
    return facts["model name"], f"{facts.get('flags', '')} {facts.get('Features', '')}".split()


def allow_open_files(count: int) -> None:
    """Let the process open ``count`` files and connections, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def ready_streams() -> None:
    """Let streams be UTF-8, and consoles take codes for colours, where neither goes without
    saying."""


def terminal_mode(echo: bool = True) -> Callable[[], object]:
    """What restores the terminal's mode as it is now; without ``echo`` what is typed meanwhile does
    not show, and an Enter stays one for who reads keys later: it becomes no line feed."""
    if not sys.stdin.isatty():
        return lambda: None
    before = termios.tcgetattr(sys.stdin)
    if not echo:
        silent = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~termios.ECHO, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def bound(seconds: float, memory: int | None) -> None:
    """Let this process have so many seconds of CPU time from now on, 0 for no limit, and ``memory``
    bytes of addresses in all, None for no limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    limit = resource.RLIM_INFINITY if memory is None else memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def deadline(process: "Popen[bytes]", cpu_seconds: float, seconds: float) -> Timer:
    """A timer that kills the process after so many seconds; ``cpu_seconds``, which it may have of
    CPU time, are for ``bound`` to limit."""
    return Timer(seconds, process.kill)


def apart() -> dict[str, Any]:
    """How a child starts with no environment and out of reach of this terminal's Ctrl-C."""
    return {"env": {}, "cwd": "/", "start_new_session": True}
