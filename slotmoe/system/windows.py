"""Windows, from version 10 on."""

import ctypes
import errno
import io
import mmap
import msvcrt
import os
import signal
import sys
import threading
import time
import weakref
import winreg
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_char, c_longlong, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from subprocess import Popen
from threading import Timer
from typing import Any

import psutil

assert sys.platform == "win32"

FILE = NO_LINK = os.O_BINARY | os.O_NOINHERIT  # links need rights that few have
_KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
_KERNEL.ReOpenFile.restype = _KERNEL.GetStdHandle.restype = c_void_p
_KERNEL.CreateJobObjectW.restype = _KERNEL.GetCurrentProcess.restype = c_void_p
_KERNEL.CreateEventW.restype, _KERNEL.CloseHandle.argtypes = c_void_p, (c_void_p,)
for _name in ("ReadFile", "WriteFile"):
    getattr(_KERNEL, _name).argtypes = c_void_p, c_void_p, c_uint32, c_void_p, c_void_p
_KERNEL.GetOverlappedResult.argtypes = c_void_p, c_void_p, c_void_p, ctypes.c_int
_KERNEL.VirtualAlloc.restype, _KERNEL.GetLargePageMinimum.restype = c_void_p, c_size_t
_KERNEL.VirtualAlloc.argtypes = c_void_p, c_size_t, c_uint32, c_uint32
_KERNEL.VirtualFree.argtypes = c_void_p, c_size_t, c_uint32
_KERNEL.VirtualLock.argtypes = c_void_p, c_size_t
_KERNEL.SetProcessWorkingSetSizeEx.argtypes = c_void_p, c_size_t, c_size_t, c_uint32
_PROCESS = c_void_p(-1)  # this one
_READ, _SHARED, _NO_BUFFERING, _OVERLAPPED = 0x80000000, 7, 0x20000000, 0x40000000
_STORAGE_INFO, _PENDING, _MOST_AT_ONCE = 16, 997, 1 << 30
_COMMIT, _RESERVE, _RELEASE, _LARGE_PAGES, _READ_WRITE = 0x1000, 0x2000, 0x8000, 0x20000000, 4
_SOFT_LIMITS = 2 | 8  # which the system may exceed both ways
_BESIDE = 64 << 20  # bytes that stay in RAM beside those that ``hold`` locks
_REPLACE_EXISTING, _WRITE_THROUGH = 1, 8
_LOCK_EXCLUSIVELY_NOW = 3
_SHARING_VIOLATION, _ACCESS_DENIED, _LOCK_VIOLATION, _END_OF_FILE = 32, 5, 33, 38
_HELD_SECONDS = 2.0  # for which a virus scanner may hold a new file

# Files


class _Overlapped(ctypes.Structure):
    """Where a read or write begins, whatever the position of the file is."""

    _fields_ = (
        *(("status", c_size_t), ("count", c_size_t)),
        *(("offset", c_uint64), ("event", c_void_p)),
    )


class _Transfers(threading.local):
    """A thread's reads and writes, one at a time; those of others may be in flight beside it."""

    def __init__(self) -> None:
        event = c_void_p(_KERNEL.CreateEventW(None, True, False, None))
        self._at = _Overlapped(0, 0, 0, event)
        weakref.finalize(self._at, _KERNEL.CloseHandle, event).atexit = False
        # What is in flight must not lose its memory, even if an exception strikes meanwhile.
        self._memory: c_char | None = None

    def run(self, call: Any, handle: int, memory: memoryview, offset: int) -> int:
        """Bytes that ``ReadFile`` or ``WriteFile`` have moved."""
        file, at, done = msvcrt.get_osfhandle(handle), byref(self._at), c_uint32()
        if self._memory is not None:
            _KERNEL.GetOverlappedResult(file, at, byref(done), True)
        self._memory, self._at.offset = c_char.from_buffer(memory), offset
        good = call(file, byref(self._memory), min(len(memory), _MOST_AT_ONCE), None, at)
        if good or ctypes.get_last_error() == _PENDING:
            good = _KERNEL.GetOverlappedResult(file, at, byref(done), True)
        self._memory = None
        if not good and (code := ctypes.get_last_error()) != _END_OF_FILE:
            raise ctypes.WinError(code)
        return done.value


_transfers = _Transfers()


def open_to_read(path: Path) -> int:
    """See ``posix``."""
    handle = os.open(path, os.O_RDONLY | FILE)
    _reopen(handle, _OVERLAPPED)  # else a second read waits for the first
    return handle


def read_at(handle: int, memory: memoryview, offset: int) -> int:
    """See ``posix``."""
    return _transfers.run(_KERNEL.ReadFile, handle, memory, offset)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """See ``posix``."""
    if data.readonly:
        data = memoryview(bytearray(data))
    while data:
        count = _transfers.run(_KERNEL.WriteFile, handle, data, offset)
        data, offset = data[count:], offset + count


def move(source: Path, target: Path) -> None:
    """See ``posix``; durable when it returns."""
    until = time.monotonic() + _HELD_SECONDS
    flags = _WRITE_THROUGH if source.is_dir() else _WRITE_THROUGH | _REPLACE_EXISTING
    while not _KERNEL.MoveFileExW(_long(source), _long(target), flags):
        code = ctypes.get_last_error()
        is_held = code in (_SHARING_VIOLATION, _ACCESS_DENIED) and time.monotonic() < until
        if not is_held:
            raise OSError(None, ctypes.FormatError(code), str(target), code)
        time.sleep(0.02)


def _long(path: Path) -> str:
    """A path that may be longer than 260 characters."""
    text = os.path.abspath(path)
    if text.startswith("\\\\"):
        return text if text.startswith("\\\\?\\") else "\\\\?\\UNC\\" + text[2:]
    return "\\\\?\\" + text


def sync_folder(folder: Path) -> None:
    """``move`` has done so."""


def lock_file(path: Path) -> int:
    """See ``posix``."""
    return _lock(path, os.O_RDWR | os.O_CREAT | FILE)


def lock_folder(path: Path) -> int:
    """See ``posix``.  A folder has no lock here: one beside it that goes when it is closed."""
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    beside, flags = path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_TEMPORARY
    return _lock(beside, flags | FILE)


def _lock(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags, 0o600)
    except PermissionError:  # it goes in this moment
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from None
    file, at, one = c_void_p(msvcrt.get_osfhandle(handle)), _Overlapped(0, 0, 1 << 62), c_uint32(1)
    if _KERNEL.LockFileEx(file, _LOCK_EXCLUSIVELY_NOW, 0, one, 0, byref(at)):
        return handle
    code = ctypes.get_last_error()
    os.close(handle)
    if code == _LOCK_VIOLATION:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    raise ctypes.WinError(code)


def bypass_page_cache(handle: int, alignment: int) -> bool:
    """See ``posix``."""
    facts, file = (c_uint32 * 7)(), c_void_p(msvcrt.get_osfhandle(handle))
    known = _KERNEL.GetFileInformationByHandleEx(file, _STORAGE_INFO, facts, ctypes.sizeof(facts))
    is_fine = not known or facts[0] <= alignment  # the first is a sector's bytes
    return is_fine and _reopen(handle, _OVERLAPPED | _NO_BUFFERING, alignment)


def use_page_cache(handle: int) -> None:
    """See ``posix``."""
    _reopen(handle, _OVERLAPPED)


def _reopen(handle: int, flags: int, alignment: int = 0) -> bool:
    """Let the descriptor ``handle`` be the same file, opened with other flags, if that is allowed
    and bytes can be read at an odd multiple of ``alignment``."""
    file = c_void_p(msvcrt.get_osfhandle(handle))
    again = _KERNEL.ReOpenFile(file, c_uint32(_READ), _SHARED, c_uint32(flags))
    if again in (None, c_void_p(-1).value):
        return False
    other = msvcrt.open_osfhandle(again, os.O_RDONLY | os.O_BINARY)
    try:
        if alignment:
            read_at(other, memoryview(mmap.mmap(-1, 2 * alignment))[alignment:], alignment)
        os.dup2(other, handle, inheritable=False)
        return True
    except OSError:
        return False
    finally:
        os.close(other)


def bytes_on_disk(path: Path) -> int:
    """See ``posix``."""
    high = c_uint32()
    low = _KERNEL.GetCompressedFileSizeW(_long(path), byref(high))
    return int(high.value << 32 | low & 0xFFFFFFFF)


# Memory and processes


def private_pages(count: int, forks: bool, is_whole: bool) -> Any:
    """See ``posix``."""
    address, large, kind = None, _large_page(), _RESERVE | _COMMIT if is_whole else _RESERVE
    if is_whole and 0 < large <= count:
        size = -(-count // large) * large
        address = _KERNEL.VirtualAlloc(None, size, kind | _LARGE_PAGES, _READ_WRITE)
    address = address or _allocate(None, count, kind)
    region = (c_char * count).from_address(address)
    weakref.finalize(region, _free, address, count).atexit = False
    return region


def _allocate(address: int | None, size: int, kind: int) -> int:
    if start := _KERNEL.VirtualAlloc(address, size, kind, _READ_WRITE):
        return int(start)
    raise ctypes.WinError(ctypes.get_last_error())


def commit(address: int, size: int) -> None:
    """See ``posix``."""
    _allocate(address, size, _COMMIT)


def _free(address: int, count: int) -> None:
    _KERNEL.VirtualFree(address, 0, _RELEASE)
    with _holding:
        for start in [start for start in _held if address <= start < address + count]:
            del _held[start]


@cache
def _large_page() -> int:
    """Bytes of a large page; 0 where this user has not the right to lock pages in memory."""
    rights, token = ctypes.WinDLL("advapi32", use_last_error=True), c_void_p()
    if not rights.OpenProcessToken(_PROCESS, 0x28, byref(token)):  # to ask and to change
        return 0
    asked = (c_uint32 * 4)(1, 0, 0, 2)  # a count, the right's number, and: use it
    rights.LookupPrivilegeValueW(None, "SeLockMemoryPrivilege", byref(asked, 4))
    rights.AdjustTokenPrivileges(token, False, asked, 0, None, None)
    code = ctypes.get_last_error()
    _KERNEL.CloseHandle(token)
    return 0 if code else int(_KERNEL.GetLargePageMinimum())


_held: dict[int, int] = {}  # bytes that are locked, by their address
_holding = threading.RLock()  # what frees memory may come at any time


def hold(address: int, size: int) -> None:
    """See ``posix``.  As much can be locked as the working set has at least."""
    with _holding:
        least = sum(_held.values()) + size + _BESIDE
        _KERNEL.SetProcessWorkingSetSizeEx(_PROCESS, least, least + _BESIDE, _SOFT_LIMITS)
        if size and _KERNEL.VirtualLock(address, size):
            _held[address] = size


def large_pages() -> tuple[str, str]:
    """See ``posix``."""
    if _large_page():
        return f"large pages of {_large_page() >> 20} MiB", ""
    advice = "give this user the right to lock pages in memory (secpol.msc, Local Policies)"
    return "no large pages", advice


def process_bytes() -> int:
    """What this process has of the memory that the system can give, used by now or not."""
    return int(psutil.Process().memory_info().pagefile)


def peak_rss() -> int:
    """The most that ``process_bytes`` was."""
    return int(psutil.Process().memory_info().peak_pagefile)


def available_memory() -> int:
    """See ``posix``; no more than the system can still give."""
    status = (c_uint64 * 8)(64)  # its own bytes; then totals, each before what is free of it
    _KERNEL.GlobalMemoryStatusEx(status)
    return int(min(status[2], status[4]))  # of RAM; of RAM and page files


def step_back() -> None:
    """See ``posix``."""
    _KERNEL.SetThreadPriority(c_void_p(-2), -2)  # this thread; the lowest but idle


def processor_name() -> tuple[str, list[str]]:
    """See ``posix``."""
    place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
        return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip(), []
    return "", []


def allow_open_files(count: int) -> None:
    """Windows has no limit."""


def ready_streams() -> None:
    """See ``posix``; a program behind a pipe gets the same bytes as elsewhere."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", newline=None if stream is sys.stdin else "\n")
    takes_codes = 4
    for number in (-11, -12):  # stdout's and stderr's
        handle, mode = c_void_p(_KERNEL.GetStdHandle(c_uint32(number & 0xFFFFFFFF))), c_uint32()
        if _KERNEL.GetConsoleMode(handle, byref(mode)):
            _KERNEL.SetConsoleMode(handle, c_uint32(mode.value | takes_codes))


def terminal_mode(echo: bool = True) -> Callable[[], object]:
    """See ``posix``."""
    handle, mode, shown = c_void_p(_KERNEL.GetStdHandle(c_uint32(-10 & 0xFFFFFFFF))), c_uint32(), 4
    if not sys.stdin.isatty() or not _KERNEL.GetConsoleMode(handle, byref(mode)):
        return lambda: None
    if not echo:
        _KERNEL.SetConsoleMode(handle, c_uint32(mode.value & ~shown))
    return lambda: _KERNEL.SetConsoleMode(handle, mode)


class _JobLimits(ctypes.Structure):
    """``JOBOBJECT_EXTENDED_LIMIT_INFORMATION``."""

    _fields_ = (
        *(("process_time", c_longlong), ("job_time", c_longlong), ("flags", c_uint32)),
        *(("least_set", ctypes.c_size_t), ("most_set", ctypes.c_size_t), ("count", c_uint32)),
        *(("affinity", ctypes.c_size_t), ("priority", c_uint32), ("scheduling", c_uint32)),
        ("transferred", ctypes.c_ulonglong * 6),
        *(("process_memory", ctypes.c_size_t), ("job_memory", ctypes.c_size_t)),
        *(("peak_process", ctypes.c_size_t), ("peak_job", ctypes.c_size_t)),
    )


_job: list[Any] = []  # of this process, once it is bound


def bound(seconds: float, memory: int | None) -> None:
    """See ``posix``; ``deadline`` limits the time."""
    if not _job:
        _job.append(c_void_p(_KERNEL.CreateJobObjectW(None, None)))
        _KERNEL.AssignProcessToJobObject(_job[0], c_void_p(_KERNEL.GetCurrentProcess()))
    limits = _JobLimits(flags=0 if memory is None else 0x100, process_memory=memory or 0)
    _KERNEL.SetInformationJobObject(_job[0], 9, byref(limits), ctypes.sizeof(limits))


def block_signals(numbers: tuple[signal.Signals, ...]) -> None:
    """The main thread gets all signals."""


class _Deadline(Timer):
    def __init__(self, process: "Popen[bytes]", cpu_seconds: float, seconds: float):
        super().__init__(seconds, process.kill)
        self._cpu, self._process = cpu_seconds, psutil.Process(process.pid)
        self._before, self._until = self._used(), time.monotonic() + seconds
        self.daemon = True

    def _used(self) -> float:
        return float(sum(self._process.cpu_times()[:2]))

    def run(self) -> None:
        with suppress(psutil.Error):
            while not self.finished.wait(0.05):
                if self._used() - self._before > self._cpu or time.monotonic() > self._until:
                    self.function()
                    self.finished.set()


def deadline(process: "Popen[bytes]", cpu_seconds: float, seconds: float) -> Timer:
    """A timer, started, that kills the process after so many seconds or so much CPU time."""
    timer = _Deadline(process, cpu_seconds, seconds)
    timer.start()
    return timer


def apart() -> dict[str, Any]:
    """See ``posix``."""
    root = os.environ.get("SYSTEMROOT", "C:\\Windows")
    new_group, no_window = 0x200, 0x8000000
    return {"env": {"SYSTEMROOT": root}, "cwd": root, "creationflags": new_group | no_window}
