"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP (Ctrl-Break, a closed window) do to a command.

Python raises ``KeyboardInterrupt`` between any two lines, where destructors lose it and imports
break.  So a signal ends the process itself, unless a command has something to finish: what a file's
final name holds is whole at any moment.  This is imported before all else, and imports little.
"""

import atexit
import os
import signal
import sys
import time
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

if sys.platform == "win32":
    import ctypes
    from ctypes import c_int, c_uint32

    ENDING = (signal.SIGINT, signal.SIGBREAK)
    _handlers: dict[int, Any] = dict.fromkeys(ENDING, signal.SIG_DFL)
    _handler, _handle = _handlers.__getitem__, _handlers.__setitem__
    _end = partial(os.kill, os.getpid())  # libraries may wait at an exit, for threads that are gone

    def _strike(event: int) -> bool:
        """Windows calls this in a thread of its own; a handler of Python's would wait for what the
        main thread waits for."""
        number = signal.SIGBREAK if event else signal.SIGINT
        if _handlers[number] == signal.SIG_DFL:
            _end(128 + number)
        _handlers[number](number, None)
        if event > 1:  # a window closes, and ends the process when this returns
            _KERNEL.Sleep(-1)
        return True

    _KERNEL, _STRIKE = ctypes.WinDLL("kernel32"), ctypes.WINFUNCTYPE(c_int, c_uint32)(_strike)
    _listen = partial(_KERNEL.SetConsoleCtrlHandler, _STRIKE)
else:
    ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _handler, _handle, _end = signal.getsignal, signal.signal, os._exit


def take() -> None:
    """From now on a signal ends this process as ``leave`` does, and does nothing from the last exit
    handler on, soon after which Python forgets its own."""
    Stopping(leave, once=False).__enter__()
    if sys.platform == "win32":
        _listen(True)
        atexit.register(_listen, False)
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in ENDING])


def block() -> None:
    """Let others than this thread, and not its children, get these signals."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def leave(number: int, remark: str = "") -> None:
    """End the process now, as by the signal ``number``; after Ctrl-C with a line."""
    _handle(number, signal.SIG_DFL)  # another one does not wait for a reader of stderr
    try:
        if os.isatty(2) and os.environ.get("TERM") != "dumb":
            os.write(2, b"\x1b[?25h")  # the cursor, which a bar hides
        if number == signal.SIGINT:
            os.write(2, os.fsencode(f"\nslotmoe: interrupted{remark}\n"))
    finally:
        _end(128 + number)


def leave_after(seconds: float, number: int) -> None:
    """End the process so much later, as by the signal ``number``, whatever its threads wait for
    then: one that renders or compiles for a stranger, a disk, a reader of stderr.  A signal's
    handler may call this: it takes no lock."""

    def end() -> None:
        time.sleep(seconds)
        _end(128 + number)

    start_new_thread(end, ())


class Stopping:
    """As a context manager: a signal is noted as ``number``, and ``stop`` called with it.  For
    ``once``, the next acts as before.  What is ignored stays so (nohup, a shell's background)."""

    def __init__(self, stop: Callable[[int], object], once: bool = True):
        self._stop, self._once, self.number = stop, once, 0

    def __enter__(self) -> "Stopping":
        before = [(number, _handler(number)) for number in ENDING]
        self._before = [each for each in before if each[1] != signal.SIG_IGN]
        for number, _ in self._before:
            _handle(number, self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before:
            _handle(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._once:
            self.__exit__()
        self.number = number
        self._stop(number)

    def check(self) -> None:
        """Raises ``KeyboardInterrupt`` or ``SystemExit`` after a signal."""
        if number := self.number:
            raise KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
