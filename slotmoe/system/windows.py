"""Windows, from version 10 on.  What a function does without a word here, ``posix`` says."""

import ctypes
import errno
import io
import mmap
import msvcrt
import os
import struct
import sys
import time
import weakref
import winreg
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_char, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from subprocess import Popen
from threading import Timer
from typing import Any, TypeVar

import psutil

assert sys.platform == "win32"

NO_LINK = os.O_BINARY | os.O_NOINHERIT  # links need rights that few have
MEMORY, ROOM = "pagefile", 64 << 10  # memory counts when it is promised, not when written
CACHES, CUDA = os.environ.get("LOCALAPPDATA") or "~/AppData/Local", "nvcuda.dll"
_KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
_KERNEL.CreateFileW.restype = _KERNEL.ReOpenFile.restype = _KERNEL.GetStdHandle.restype = c_void_p
_KERNEL.CreateJobObjectW.restype = _KERNEL.GetCurrentProcess.restype = c_void_p
_KERNEL.CreateEventW.restype = _KERNEL.VirtualAlloc.restype = c_void_p
_READ, _SHARED, _NO_BUFFERING, _OVERLAPPED = 0x80000000, 7, 0x20000000, 0x40000000
_STORAGE_INFO, _PENDING = 16, 997
_COMMIT, _LARGE_PAGES, _READ_WRITE, _RELEASE = 0x3000, 0x20000000, 4, 0x8000
_ALL, _OPEN_EXISTING, _OPEN_ALWAYS = 0xC0010000, 3, 4  # reading, writing and removal
_REPLACE_EXISTING, _WRITE_THROUGH = 1, 8
_LOCK_EXCLUSIVELY_NOW = 3
_SHARING_VIOLATION, _ACCESS_DENIED, _LOCK_VIOLATION, _END_OF_FILE = 32, 5, 33, 38
_NOT_EMPTY, _DISPOSITION, _SET_SPARSE = 145, 4, 0x900C4
# The exit code of a process that has had its CPU time, and what a write to a pipe says that nobody
# reads, in other words than EPIPE.
TOO_LONG, NO_READER = 1816, (errno.EINVAL, os.strerror(errno.EINVAL))
_HELD_SECONDS = 2.0  # for which a virus scanner may hold a new file
_HOLDER = "another program may have it open: end that, and run the same command again"
T = TypeVar("T")

# Files


_Overlapped = c_uint64 * 4  # two words of the system's, where it begins, and an event
_idle = list[Any]()
_in_flight = dict[int, Any]()  # with its memory: an exception may strike the thread that waits


def _transfer(call: Any, handle: int, memory: memoryview, offset: int) -> int:
    """Bytes that ``ReadFile`` or ``WriteFile`` have moved."""
    try:
        it = _idle.pop()
    except IndexError:
        it = _Overlapped(0, 0, 0, _KERNEL.CreateEventW(None, True, False, None))
    it[2], start, done = offset, c_char.from_buffer(memory), c_uint32()
    _in_flight[id(it)] = it, start
    file, size = c_void_p(msvcrt.get_osfhandle(handle)), min(len(memory), 1 << 30)
    good = call(file, byref(start), size, None, byref(it))
    if good or ctypes.get_last_error() == _PENDING:
        good = _KERNEL.GetOverlappedResult(file, byref(it), byref(done), True)
    code = ctypes.get_last_error()
    _idle.append(_in_flight.pop(id(it))[0])
    if not good and code != _END_OF_FILE:
        raise ctypes.WinError(code)
    return done.value


def open_file(path: Path | str, flags: int) -> int:
    """See ``posix``; Python's ``os.open`` lets others do neither."""
    access, how = (_ALL, _OPEN_ALWAYS) if flags & os.O_RDWR else (_READ, _OPEN_EXISTING)
    handle = _KERNEL.CreateFileW(_long(path), c_uint32(access), _SHARED, None, how, 0, None)
    if handle == c_void_p(-1).value:
        raise _problem(path)
    return msvcrt.open_osfhandle(handle, os.O_BINARY | os.O_NOINHERIT)


def read_at(handle: int, memory: memoryview, offset: int) -> int:
    return _transfer(_KERNEL.ReadFile, handle, memory, offset)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    if data.readonly:
        data = memoryview(bytearray(data))
    while data:
        count = _transfer(_KERNEL.WriteFile, handle, data, offset)
        data, offset = data[count:], offset + count


def move(source: Path, target: Path) -> None:
    """See ``posix``; durable when it returns."""
    flags = _WRITE_THROUGH if source.is_dir() else _WRITE_THROUGH | _REPLACE_EXISTING
    if flags == _WRITE_THROUGH:
        with suppress(OSError):  # unless it is empty
            os.rmdir(target)

    def now() -> None:
        if not _KERNEL.MoveFileExW(_long(source), _long(target), flags):
            is_free = ctypes.get_last_error() == _ACCESS_DENIED and target.is_file()
            raise _problem(target if is_free else source)

    patiently(now)


def patiently(act: Callable[..., T], *arguments: Any) -> T:
    """See ``posix``; again and again while another program has the file."""
    until = time.monotonic() + _HELD_SECONDS
    while True:
        try:
            return act(*arguments)
        except OSError as problem:
            if problem.winerror not in (_SHARING_VIOLATION, _ACCESS_DENIED, _NOT_EMPTY):
                raise
            if time.monotonic() > until:
                problem.strerror = f"{problem.strerror}; {_HOLDER}"
                raise
        time.sleep(0.005)


def _problem(path: Path | str) -> OSError:
    """Why the last call has failed."""
    code = ctypes.get_last_error()
    problem = OSError(None, ctypes.FormatError(code), str(path), code)
    if isinstance(problem, FileNotFoundError):  # in the words of other systems
        problem.strerror = os.strerror(errno.ENOENT)
    return problem


def _long(path: Path | str) -> str:
    """A path that may be longer than 260 characters."""
    text = os.path.abspath(path)
    if text.startswith("\\\\"):
        return text if text.startswith("\\\\?\\") else "\\\\?\\UNC\\" + text[2:]
    return "\\\\?\\" + text


def sync_folder(folder: Path) -> None:
    """``move`` has done so."""


def lock(path: Path, folder: bool) -> int:
    """See ``posix``.  A folder has no lock here: one beside it that goes when it is closed."""
    if not folder:
        return _lock(path)
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    handle, goes = _lock(path.with_name(path.name + ".lock")), ctypes.c_bool(True)
    file = c_void_p(msvcrt.get_osfhandle(handle))
    _KERNEL.SetFileInformationByHandle(file, _DISPOSITION, byref(goes), 1)
    return handle


def _lock(path: Path) -> int:
    try:
        handle = patiently(open_file, path, os.O_RDWR)
    except PermissionError:  # it goes when another process closes it
        if not path.exists():
            raise
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from None
    file, at, one = c_void_p(msvcrt.get_osfhandle(handle)), _Overlapped(0, 0, 1 << 62), c_uint32(1)
    if _KERNEL.LockFileEx(file, _LOCK_EXCLUSIVELY_NOW, 0, one, 0, byref(at)):
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
    elif ctypes.get_last_error() != _LOCK_VIOLATION:
        os.close(handle)
        raise _problem(path)
    os.close(handle)  # another has it, or removed it in between
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def bypass_page_cache(handle: int, alignment: int) -> bool:
    facts, file = (c_uint32 * 7)(), c_void_p(msvcrt.get_osfhandle(handle))
    known = _KERNEL.GetFileInformationByHandleEx(file, _STORAGE_INFO, facts, ctypes.sizeof(facts))
    is_fine = not known or facts[0] <= alignment  # bytes of a sector
    return is_fine and _reopen(handle, _OVERLAPPED | _NO_BUFFERING, alignment)


def use_page_cache(handle: int) -> None:
    _reopen(handle, _OVERLAPPED)


def _reopen(handle: int, flags: int, alignment: int = 0) -> bool:
    """Let the descriptor ``handle`` be the same file, opened with other flags, if it can be read
    then at an odd multiple of ``alignment``."""
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


def keep_sparse(handle: int) -> None:
    file = c_void_p(msvcrt.get_osfhandle(handle))
    _KERNEL.DeviceIoControl(file, _SET_SPARSE, None, 0, None, 0, byref(c_uint32()), None)


def bytes_on_disk(path: Path) -> int:
    high = c_uint32()
    low = _KERNEL.GetCompressedFileSizeW(_long(path), byref(high))
    return int(high.value << 32 | low & 0xFFFFFFFF)


# Memory and processes


def private_pages(count: int, forks: bool) -> Any:
    address, size, large = None, c_size_t(count), _large_page()
    if 0 < large <= count:
        whole, kind = c_size_t(-(-count // large) * large), _COMMIT | _LARGE_PAGES
        address = _KERNEL.VirtualAlloc(None, whole, kind, _READ_WRITE)
    if not (address := address or _KERNEL.VirtualAlloc(None, size, _COMMIT, _READ_WRITE)):
        raise ctypes.WinError(ctypes.get_last_error())
    region, start = (c_char * count).from_address(address), c_void_p(address)
    free = weakref.finalize(region, _KERNEL.VirtualFree, start, c_size_t(0), _RELEASE)
    free.atexit = False  # threads may still use it then
    return region


@cache
def _large_page() -> int:
    """Bytes of a large page; 0 where this user has not the right to lock pages in memory."""
    rights, token = ctypes.WinDLL("advapi32", use_last_error=True), c_void_p()
    asked = (c_uint32 * 4)(1, 0, 0, 2)  # a count, the right's number, and: use it
    rights.OpenProcessToken(c_void_p(-1), 0x28, byref(token))  # to ask and to change
    rights.LookupPrivilegeValueW(None, "SeLockMemoryPrivilege", byref(asked, 4))
    rights.AdjustTokenPrivileges(token, False, asked, 0, None, None)
    code = ctypes.get_last_error()  # also where it says that all is well
    _KERNEL.CloseHandle(token)
    return 0 if code else _KERNEL.GetLargePageMinimum()


def hold(address: int, size: int) -> None:
    """See ``posix``.  No more can be locked than the working set has at least."""
    beside, soft = 64 << 20, 2 | 8  # bytes of files; limits that the system may exceed
    least = psutil.Process().memory_info().pagefile + beside
    limits = c_size_t(least), c_size_t(least + beside)
    _KERNEL.SetProcessWorkingSetSizeEx(c_void_p(-1), *limits, soft)
    _KERNEL.VirtualLock(c_void_p(address), c_size_t(size))


def peak_rss() -> int:
    return int(psutil.Process().memory_info().peak_pagefile)


def available_memory() -> int:
    status = (c_uint64 * 8)(64)  # its own bytes; then totals, each before what is left of it
    _KERNEL.GlobalMemoryStatusEx(status)
    return min(status[2], status[4])  # of RAM; of RAM and page files


def step_back() -> None:
    _KERNEL.SetThreadPriority(c_void_p(-2), -2)  # this thread; the lowest but idle


def processor_name() -> tuple[str, list[str]]:
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
        is_console = _KERNEL.GetConsoleMode(handle, byref(mode))
        if is_console and not _KERNEL.SetConsoleMode(handle, c_uint32(mode.value | takes_codes)):
            os.environ |= {"TERM": "dumb", "NO_COLOR": "1"}  # an old one


def terminal_mode(echo: bool = True) -> Callable[[], object]:
    handle, mode, shown = c_void_p(_KERNEL.GetStdHandle(c_uint32(-10 & 0xFFFFFFFF))), c_uint32(), 4
    if not sys.stdin.isatty() or not _KERNEL.GetConsoleMode(handle, byref(mode)):
        return lambda: None
    if not echo:
        _KERNEL.SetConsoleMode(handle, c_uint32(mode.value & ~shown))
    return lambda: _KERNEL.SetConsoleMode(handle, mode)


_job: list[Any] = []  # of this process, once it is bound


def bound(seconds: float, memory: int | None) -> None:
    """See ``posix``; ``deadline`` limits the time."""
    _KERNEL.SetErrorMode(3)  # no report of a crash
    if not _job:
        _job.append(c_void_p(_KERNEL.CreateJobObjectW(None, None)))
        _KERNEL.AssignProcessToJobObject(_job[0], c_void_p(_KERNEL.GetCurrentProcess()))
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION: its LimitFlags and ProcessMemoryLimit.
    limits = struct.pack("=16x I 92x Q 24x", 0 if memory is None else 0x100, memory or 0)
    _KERNEL.SetInformationJobObject(_job[0], 9, limits, len(limits))


class _Deadline(Timer):
    """``args`` are the process, and seconds of CPU time that end it too."""

    def run(self) -> None:
        until, (pid, most) = time.monotonic() + self.interval, self.args
        while not self.finished.wait(0.05) and time.monotonic() < until:
            with suppress(OSError):  # it has ended
                if _used(pid) > most:
                    os.kill(pid, TOO_LONG)
        if not self.finished.is_set():
            self.function()


def _used(pid: int) -> float:
    """Seconds of CPU time that a process has had; 0 if it has ended."""
    with suppress(psutil.Error):
        return float(sum(psutil.Process(pid).cpu_times()[:2]))
    return 0.0


def deadline(process: "Popen[bytes]", cpu_seconds: float, seconds: float) -> Timer:
    """A timer that kills the process after so many seconds or so much CPU time."""
    return _Deadline(seconds, process.kill, (process.pid, _used(process.pid) + cpu_seconds))


def apart() -> dict[str, Any]:
    root = os.environ.get("SYSTEMROOT", "C:\\Windows")
    new_group, no_window = 0x200, 0x8000000
    return {"env": {"SYSTEMROOT": root}, "cwd": root, "creationflags": new_group | no_window}
