"""Windows, from version 10 on."""

import ctypes
import errno
import io
import mmap
import msvcrt
import os
import struct
import sys
import time
import winreg
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_uint32, c_void_p
from pathlib import Path
from subprocess import Popen
from threading import Timer
from typing import Any, TypeVar

import psutil

assert sys.platform == "win32"

FILE = NO_LINK = os.O_BINARY | os.O_NOINHERIT  # links need rights that few have
CACHES, CUDA = os.environ.get("LOCALAPPDATA") or "~/AppData/Local", "nvcuda.dll"
_KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
_KERNEL.CreateFileW.restype = _KERNEL.ReOpenFile.restype = _KERNEL.GetStdHandle.restype = c_void_p
_KERNEL.CreateJobObjectW.restype = _KERNEL.GetCurrentProcess.restype = c_void_p
_READ, _SHARED, _NO_BUFFERING = 0x80000000, 7, 0x20000000
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


class _Overlapped(ctypes.Structure):
    """Where a read or write begins, whatever the position of the file is."""

    _fields_ = (
        *(("internal", c_void_p), ("internal_high", c_void_p)),
        *(("offset", c_uint32), ("offset_high", c_uint32), ("event", c_void_p)),
    )

    def __init__(self, offset: int):
        super().__init__(offset=offset & 0xFFFFFFFF, offset_high=offset >> 32)


def _transfer(call: Any, handle: int, memory: memoryview, offset: int) -> int:
    """Bytes that ``ReadFile`` or ``WriteFile`` have moved."""
    address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    size, done = min(len(memory), 1 << 30), c_uint32()
    file, at = c_void_p(msvcrt.get_osfhandle(handle)), _Overlapped(offset)
    good = call(file, c_void_p(address), c_uint32(size), byref(done), byref(at))
    if not good and (code := ctypes.get_last_error()) != _END_OF_FILE:
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
    """See ``posix``."""
    return _transfer(_KERNEL.ReadFile, handle, memory, offset)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """See ``posix``."""
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
    return OSError(None, ctypes.FormatError(code), str(path), code)


def _long(path: Path | str) -> str:
    """A path that may be longer than 260 characters."""
    text = os.path.abspath(path)
    if text.startswith("\\\\"):
        return text if text.startswith("\\\\?\\") else "\\\\?\\UNC\\" + text[2:]
    return "\\\\?\\" + text


def sync_folder(folder: Path) -> None:
    """``move`` has done so."""


def lock_file(path: Path) -> int:
    """See ``posix``."""
    return _lock(path)


def lock_folder(path: Path) -> int:
    """See ``posix``.  A folder has no lock here: one beside it that goes when it is closed."""
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
    file, at, one = c_void_p(msvcrt.get_osfhandle(handle)), _Overlapped(1 << 62), c_uint32(1)
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
    """See ``posix``."""
    if not _reopen(handle, _NO_BUFFERING):
        return False
    try:
        read_at(handle, memoryview(mmap.mmap(-1, alignment)), alignment)
        return True
    except OSError:
        use_page_cache(handle)
        return False


def use_page_cache(handle: int) -> None:
    """See ``posix``."""
    _reopen(handle, 0)


def _reopen(handle: int, flags: int) -> bool:
    """Let the descriptor ``handle`` be the same file, opened with other flags."""
    file = c_void_p(msvcrt.get_osfhandle(handle))
    again = _KERNEL.ReOpenFile(file, c_uint32(_READ), _SHARED, c_uint32(flags))
    if again in (None, c_void_p(-1).value):
        return False
    other = msvcrt.open_osfhandle(again, os.O_RDONLY | os.O_BINARY)
    os.dup2(other, handle, inheritable=False)
    os.close(other)
    return True


def keep_sparse(handle: int) -> None:
    """See ``posix``."""
    file = c_void_p(msvcrt.get_osfhandle(handle))
    _KERNEL.DeviceIoControl(file, _SET_SPARSE, None, 0, None, 0, byref(c_uint32()), None)


def bytes_on_disk(path: Path) -> int:
    """See ``posix``."""
    high = c_uint32()
    low = _KERNEL.GetCompressedFileSizeW(_long(path), byref(high))
    return int(high.value << 32 | low & 0xFFFFFFFF)


# Memory and processes


def private_pages(count: int, forks: bool) -> mmap.mmap:
    """See ``posix``."""
    return mmap.mmap(-1, count)


def peak_rss() -> int:
    """See ``posix``."""
    return int(psutil.Process().memory_info().peak_wset)


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
        is_console = _KERNEL.GetConsoleMode(handle, byref(mode))
        if is_console and not _KERNEL.SetConsoleMode(handle, c_uint32(mode.value | takes_codes)):
            os.environ |= {"TERM": "dumb", "NO_COLOR": "1"}  # an old one


def terminal_mode(echo: bool = True) -> Callable[[], object]:
    """See ``posix``."""
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
    """A timer, started, that kills the process after so many seconds or so much CPU time."""
    timer = _Deadline(seconds, process.kill, (process.pid, _used(process.pid) + cpu_seconds))
    timer.daemon = True
    timer.start()
    return timer


def apart() -> dict[str, Any]:
    """See ``posix``."""
    root = os.environ.get("SYSTEMROOT", "C:\\Windows")
    new_group, no_window = 0x200, 0x8000000
    return {"env": {"SYSTEMROOT": root}, "cwd": root, "creationflags": new_group | no_window}
